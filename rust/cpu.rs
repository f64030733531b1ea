//! What this CPU can do, as values that cannot be built where it is not true.
//!
//! Both `kernels/` and `ops/` choose code by instruction set, so the proof
//! lives beside neither. An [`Isa`] is a promise that its instructions exist
//! here *and* that the operating system saves their registers
//! (`is_x86_feature_detected!` checks XCR0); whoever holds one may call code
//! compiled for it.

// The two calls of `vectorize` below: entering code compiled for a feature
// that `self` proves.
#![allow(unsafe_code)]

use std::sync::OnceLock;

use crate::error::{Error, invalid};

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Level {
    Generic,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

/// An instruction-set level that this CPU has. Levels are ordered: a later
/// one has everything of the earlier ones.
///
/// - `generic`: what the target's baseline guarantees (SSE2; NEON on aarch64)
/// - `avx2`: AVX2, FMA and F16C
/// - `avx512`: AVX-512 F, BW, VL and VNNI
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Isa(Level);

/// Names that `BITNET_RS_ISA` takes, lowest first.
pub const ISA_NAMES: [&str; 3] = ["generic", "avx2", "avx512"];

impl Isa {
    /// The level that every CPU of the target has.
    pub const GENERIC: Isa = Isa(Level::Generic);

    /// The highest level here, or the cap of `BITNET_RS_ISA` if that is lower.
    /// Read once in a process.
    ///
    /// # Errors
    /// `BITNET_RS_ISA` is not one of [`ISA_NAMES`].
    pub fn best() -> Result<Isa, Error> {
        static BEST: OnceLock<Result<Isa, Error>> = OnceLock::new();
        BEST.get_or_init(|| {
            let found = Isa(detect());
            match std::env::var("BITNET_RS_ISA") {
                Ok(cap) if !cap.is_empty() => {
                    let rank = ISA_NAMES.iter().position(|name| *name == cap).ok_or_else(|| {
                        invalid!(
                            "BITNET_RS_ISA is {cap:?}; wanted one of {}, or unset",
                            ISA_NAMES.join(", ")
                        )
                    })?;
                    Ok(if rank < found.rank() { Isa::available()[rank] } else { found })
                }
                _ => Ok(found),
            }
        })
        .clone()
    }

    /// Every level of this CPU, lowest first, whatever `BITNET_RS_ISA` says.
    #[must_use]
    pub fn available() -> Vec<Isa> {
        #[allow(unused_mut)]
        let mut levels = vec![Isa(Level::Generic)];
        #[cfg(target_arch = "x86_64")]
        levels.extend([Level::Avx2, Level::Avx512].into_iter().filter(|l| *l <= detect()).map(Isa));
        levels
    }

    /// The name that `BITNET_RS_ISA` takes.
    #[must_use]
    pub fn name(self) -> &'static str {
        ISA_NAMES[self.rank()]
    }

    fn rank(self) -> usize {
        match self.0 {
            Level::Generic => 0,
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => 1,
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => 2,
        }
    }

    /// Instruction-set extensions in use at this level, for people.
    #[must_use]
    pub fn features(self) -> &'static [&'static str] {
        match self.0 {
            #[cfg(target_arch = "aarch64")]
            Level::Generic => &["neon"],
            #[cfg(not(target_arch = "aarch64"))]
            Level::Generic => &[],
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => &["avx2", "fma", "f16c"],
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => {
                &["avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512vnni"]
            }
        }
    }

    /// The proof type of this level.
    pub(crate) fn proof(self) -> Proof {
        match self.0 {
            Level::Generic => Proof::Generic,
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => Proof::Avx2(Avx2(())),
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => Proof::Avx512(Avx512(())),
        }
    }

    /// Runs `f` compiled for this level. `f` must be marked `#[inline(always)]`,
    /// and so must what it calls; the compiler then vectorizes it with these
    /// instructions. Rust's float semantics are strict, so the bits do not
    /// depend on the level: the same source is the scalar twin and the fast one.
    #[inline(always)]
    pub fn vectorize<R>(self, f: impl FnOnce() -> R) -> R {
        match self.0 {
            Level::Generic => f(),
            // SAFETY: `self` proves that the CPU has AVX2, FMA and F16C.
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => unsafe { run_avx2(f) },
            // SAFETY: `self` proves that the CPU has AVX-512 F, BW, VL and VNNI.
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => unsafe { run_avx512(f) },
        }
    }
}

#[cfg(target_arch = "x86_64")]
fn detect() -> Level {
    let avx2 = is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("fma")
        && is_x86_feature_detected!("f16c");
    let avx512 = avx2
        && is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512vnni");
    match (avx2, avx512) {
        (_, true) => Level::Avx512,
        (true, false) => Level::Avx2,
        (false, false) => Level::Generic,
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn detect() -> Level {
    Level::Generic
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
fn run_avx2<R>(f: impl FnOnce() -> R) -> R {
    f()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
fn run_avx512<R>(f: impl FnOnce() -> R) -> R {
    f()
}

/// What an [`Isa`] proves, as types: code for an instruction set takes its
/// proof by value, and cannot be reached without.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Proof {
    /// Nothing beyond the target's baseline.
    Generic,
    #[cfg(target_arch = "x86_64")]
    Avx2(Avx2),
    #[cfg(target_arch = "x86_64")]
    Avx512(Avx512),
}

/// Proof that a CPU has AVX2, FMA and F16C.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Avx2(());

/// Proof that a CPU has AVX-512 F, BW, VL and VNNI, and all that [`Avx2`] proves.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Avx512(());
