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
    Ssse3,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    AvxVnni,
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Avx512Vbmi,
    #[cfg(target_arch = "aarch64")]
    Neon,
    #[cfg(target_arch = "aarch64")]
    Dotprod,
    #[cfg(target_arch = "aarch64")]
    I8mm,
}

/// Every level of this architecture, lowest first; [`ISA_NAMES`] has the same
/// order.
#[cfg(target_arch = "x86_64")]
const LEVELS: [Level; 6] =
    [Level::Generic, Level::Ssse3, Level::Avx2, Level::AvxVnni, Level::Avx512, Level::Avx512Vbmi];
#[cfg(target_arch = "aarch64")]
const LEVELS: [Level; 4] = [Level::Generic, Level::Neon, Level::Dotprod, Level::I8mm];
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
const LEVELS: [Level; 1] = [Level::Generic];

/// An instruction-set level that this CPU has. Levels are ordered: a later
/// one has everything of the earlier ones.
///
/// On x86-64:
///
/// - `generic`: SSE2, which every such CPU has; scalar kernels
/// - `ssse3`: byte shuffles and `pmaddubsw`, 128 bits wide
/// - `avx2`: AVX2, FMA and F16C
/// - `avxvnni`: `vpdpbusd` on 256 bits, in either encoding: AVX-VNNI, or
///   AVX-512 VNNI with VL
/// - `avx512`: AVX-512 F, BW, VL and VNNI
/// - `avx512vbmi`: byte permutations over two registers (`vpermi2b`), too
///
/// On aarch64:
///
/// - `generic`: scalar kernels; the float half is compiled with NEON, which
///   the architecture guarantees
/// - `neon`: NEON kernels
/// - `dotprod`: `sdot`
/// - `i8mm`: `smmla`
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Isa(Level);

/// Names that `BITNET_RS_ISA` takes on this architecture, lowest first.
#[cfg(target_arch = "x86_64")]
pub const ISA_NAMES: [&str; LEVELS.len()] =
    ["generic", "ssse3", "avx2", "avxvnni", "avx512", "avx512vbmi"];
/// Names that `BITNET_RS_ISA` takes on this architecture, lowest first.
#[cfg(target_arch = "aarch64")]
pub const ISA_NAMES: [&str; LEVELS.len()] = ["generic", "neon", "dotprod", "i8mm"];
/// Names that `BITNET_RS_ISA` takes on this architecture, lowest first.
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
pub const ISA_NAMES: [&str; LEVELS.len()] = ["generic"];

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
                    Ok(found.min(Isa(LEVELS[rank])))
                }
                _ => Ok(found),
            }
        })
        .clone()
    }

    /// Every level of this CPU, lowest first, whatever `BITNET_RS_ISA` says.
    #[must_use]
    pub fn available() -> Vec<Isa> {
        let highest = detect();
        LEVELS.into_iter().filter(|level| *level <= highest).map(Isa).collect()
    }

    /// The name that `BITNET_RS_ISA` takes.
    #[must_use]
    pub fn name(self) -> &'static str {
        let rank = LEVELS.iter().position(|level| *level == self.0).unwrap_or(0);
        ISA_NAMES[rank]
    }

    /// Instruction-set extensions in use at this level, for people.
    #[must_use]
    pub fn features(self) -> &'static [&'static str] {
        match self.0 {
            #[cfg(target_arch = "aarch64")]
            Level::Generic | Level::Neon => &["neon"],
            #[cfg(target_arch = "aarch64")]
            Level::Dotprod => &["neon", "dotprod"],
            #[cfg(target_arch = "aarch64")]
            Level::I8mm => &["neon", "dotprod", "i8mm"],
            #[cfg(not(target_arch = "aarch64"))]
            Level::Generic => &[],
            #[cfg(target_arch = "x86_64")]
            Level::Ssse3 => &["ssse3"],
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => &["avx2", "fma", "f16c"],
            #[cfg(target_arch = "x86_64")]
            Level::AvxVnni => match AvxVnni::detect() {
                Some(AvxVnni::Evex(_)) => &["avx2", "fma", "f16c", "avx512vl", "avx512vnni"],
                _ => &["avx2", "fma", "f16c", "avxvnni"],
            },
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => {
                &["avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512vnni"]
            }
            #[cfg(target_arch = "x86_64")]
            Level::Avx512Vbmi => &[
                "avx2",
                "fma",
                "f16c",
                "avx512f",
                "avx512bw",
                "avx512vl",
                "avx512vnni",
                "avx512vbmi",
            ],
        }
    }

    /// The proof type of this level.
    pub(crate) fn proof(self) -> Proof {
        match self.0 {
            Level::Generic => Proof::Generic,
            #[cfg(target_arch = "x86_64")]
            Level::Ssse3 => Proof::Ssse3(Ssse3(())),
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => Proof::Avx2(Avx2(())),
            // A level of `AvxVnni` was detected, so one of the encodings exists.
            #[cfg(target_arch = "x86_64")]
            Level::AvxVnni => AvxVnni::detect().map_or(Proof::Avx2(Avx2(())), Proof::AvxVnni),
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => Proof::Avx512(Avx512(())),
            #[cfg(target_arch = "x86_64")]
            Level::Avx512Vbmi => Proof::Avx512Vbmi(Avx512Vbmi(())),
            #[cfg(target_arch = "aarch64")]
            Level::Neon => Proof::Neon(Neon(())),
            #[cfg(target_arch = "aarch64")]
            Level::Dotprod => Proof::Dotprod(Dotprod(())),
            #[cfg(target_arch = "aarch64")]
            Level::I8mm => Proof::I8mm(I8mm(())),
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
            // Nothing in the float half gains from byte shuffles.
            #[cfg(target_arch = "x86_64")]
            Level::Ssse3 => f(),
            // SAFETY: `self` proves that the CPU has AVX2, FMA and F16C.
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 | Level::AvxVnni => unsafe { run_avx2(f) },
            // SAFETY: `self` proves that the CPU has AVX-512 F, BW, VL and VNNI.
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 | Level::Avx512Vbmi => unsafe { run_avx512(f) },
            // NEON is the target's baseline, and dot products are not for floats.
            #[cfg(target_arch = "aarch64")]
            Level::Neon | Level::Dotprod | Level::I8mm => f(),
        }
    }
}

/// `is_x86_feature_detected!` asks CPUID and XCR0: a feature whose registers
/// the operating system does not save counts as absent.
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
    if avx512 && is_x86_feature_detected!("avx512vbmi") {
        Level::Avx512Vbmi
    } else if avx512 {
        Level::Avx512
    } else if avx2 && AvxVnni::detect().is_some() {
        Level::AvxVnni
    } else if avx2 {
        Level::Avx2
    } else if is_x86_feature_detected!("ssse3") {
        Level::Ssse3
    } else {
        Level::Generic
    }
}

/// The standard library asks the operating system (`getauxval` on Linux).
#[cfg(target_arch = "aarch64")]
fn detect() -> Level {
    let dotprod = std::arch::is_aarch64_feature_detected!("dotprod");
    let i8mm = dotprod && std::arch::is_aarch64_feature_detected!("i8mm");
    match (std::arch::is_aarch64_feature_detected!("neon"), dotprod, i8mm) {
        (true, _, true) => Level::I8mm,
        (true, true, false) => Level::Dotprod,
        (true, false, _) => Level::Neon,
        (false, ..) => Level::Generic,
    }
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
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
    Ssse3(Ssse3),
    #[cfg(target_arch = "x86_64")]
    Avx2(Avx2),
    #[cfg(target_arch = "x86_64")]
    AvxVnni(AvxVnni),
    #[cfg(target_arch = "x86_64")]
    Avx512(Avx512),
    #[cfg(target_arch = "x86_64")]
    Avx512Vbmi(Avx512Vbmi),
    #[cfg(target_arch = "aarch64")]
    Neon(Neon),
    #[cfg(target_arch = "aarch64")]
    Dotprod(Dotprod),
    #[cfg(target_arch = "aarch64")]
    I8mm(I8mm),
}

/// Proof that a CPU has SSSE3.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ssse3(());

/// Proof that a CPU has AVX2, FMA and F16C.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Avx2(());

/// Proof that a CPU has `vpdpbusd` on 256-bit registers, and all that
/// [`Avx2`] proves. The instruction has two encodings; which one exists is
/// part of the proof.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy, Debug)]
pub(crate) enum AvxVnni {
    /// AVX-VNNI: Alder Lake and its descendants, Zen 5.
    Vex(Vex),
    /// AVX-512 VNNI with VL.
    Evex(Evex),
}

/// Proof that a CPU has AVX-VNNI.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Vex(());

/// Proof that a CPU has AVX-512 VNNI and VL.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Evex(());

#[cfg(target_arch = "x86_64")]
impl AvxVnni {
    fn detect() -> Option<Self> {
        if is_x86_feature_detected!("avxvnni") {
            Some(Self::Vex(Vex(())))
        } else if is_x86_feature_detected!("avx512vnni") && is_x86_feature_detected!("avx512vl") {
            Some(Self::Evex(Evex(())))
        } else {
            None
        }
    }
}

/// Proof that a CPU has AVX-512 F, BW, VL and VNNI, and all that [`Avx2`] proves.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Avx512(());

/// Proof that a CPU has AVX-512 VBMI, and all that [`Avx512`] proves.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Avx512Vbmi(());

/// What the float half needs of a level.
#[cfg(target_arch = "x86_64")]
impl AvxVnni {
    pub(crate) fn avx2(self) -> Avx2 {
        Avx2(())
    }
}

#[cfg(target_arch = "x86_64")]
impl Avx512 {
    pub(crate) fn avx2(self) -> Avx2 {
        Avx2(())
    }
}

#[cfg(target_arch = "x86_64")]
impl Avx512Vbmi {
    pub(crate) fn avx512(self) -> Avx512 {
        Avx512(())
    }
}

/// Proof that a CPU has NEON.
#[cfg(target_arch = "aarch64")]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Neon(());

/// Proof that a CPU has `sdot` and `udot`, and all that [`Neon`] proves.
#[cfg(target_arch = "aarch64")]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Dotprod(());

/// Proof that a CPU has `smmla`, and all that [`Dotprod`] proves.
#[cfg(target_arch = "aarch64")]
#[derive(Clone, Copy, Debug)]
pub(crate) struct I8mm(());

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_are_ordered_and_named() {
        assert!(LEVELS.is_sorted());
        let available = Isa::available();
        assert_eq!(available[0], Isa::GENERIC);
        // A level that is detected and not listed would have no name.
        assert_eq!(available.last(), Some(&Isa(detect())));
        for (isa, name) in available.iter().zip(ISA_NAMES) {
            assert_eq!(isa.name(), name);
        }
    }
}
