//! Every kernel of this machine beside the machine's limits, in one run:
//! `cargo bench --bench kernel_table` prints a JSON object a line, which
//! `benches/record_kernels.py` turns into the tables of docs/kernels.md.
//!
//! Not criterion: a table of ratios wants all rows measured under the same
//! conditions. Kernels take turns, round after round, so that a drift of the
//! machine meets all of them; medians count. Weights are random.
//!
//! - from memory: one GEMV over 256 MiB of packed weights, more than the caches
//! - from the cache: one GEMV over 256 KiB
//! - element-wise tables for other levels than trits: from the cache, one width
//! - GEMM: 2560 rows, 4, 16 and 512 tokens; weights from the cache, arithmetic decides

// The dot-product peak is measured by the instructions themselves, in `asm!`,
// which the compiler can neither hoist nor leave out.
#![allow(unsafe_code)]
// A program that prints its results.
#![allow(clippy::print_stdout)]

use std::hint::black_box;
use std::time::Instant;

use bitnet_rs::cpu::Isa;
use bitnet_rs::kernels::{
    Kernel, Kernels, PackedMatrix, Prepared, available, available_for, multiply,
};
use bitnet_rs::levels::Levels;
use bitnet_rs::threads::{Team, read_bandwidth};

/// Widths of the 2B, 3B and 8B models.
const COLS: [usize; 6] = [2560, 6912, 3200, 8640, 4096, 14336];

/// Bytes of weights that come from memory.
const MEMORY: usize = 256 << 20;

/// Bytes of weights that stay in a second-level cache.
const CACHE: usize = 256 << 10;

/// Rows of a GEMM: those of the 2B model. For fewer, tables of tokens cost more.
const ROWS: usize = 2560;

/// Levels whose tables are measured, beside the ternary ones.
const LEVELS: [&[i8]; 5] = [
    &[-1, 1],
    &[-3, -1, 1, 3],
    &[-2, -1, 0, 1, 2],
    &[-7, -5, -3, -1, 1, 3, 5, 7],
    &[-70, -3, 3, 70],
];

/// One thing that is measured.
struct Case {
    what: &'static str,
    /// The kernel's name, with the levels if they are not ternary.
    name: String,
    kernel: &'static dyn Kernel,
    cols: usize,
    rows: usize,
    tokens: usize,
    threads: usize,
    /// Calls in one measurement: a millisecond or more.
    calls: usize,
    seconds: Vec<f64>,
    n_bytes: usize,
}

impl Case {
    fn run(&mut self, isa: Isa) {
        let team = Team::new(Some(self.threads)).expect("threads");
        let kernels = Kernels::of(self.kernel);
        let seconds = team.run(|| {
            let w = PackedMatrix::arbitrary(kernels, self.rows, self.cols, &team);
            self.n_bytes = w.n_bytes();
            let mut xs = vec![Prepared::default(); self.tokens];
            for (t, x) in xs.iter_mut().enumerate() {
                let input: Vec<f32> =
                    (0..self.cols).map(|i| ((i * 37 + t) % 255) as f32 - 127.0).collect();
                self.kernel.prepare(isa, &input, x);
            }
            let mut y = vec![0f32; self.tokens * self.rows];
            multiply(&team, &xs, [(&w, &mut y)]);
            if self.calls == 0 {
                let start = Instant::now();
                multiply(&team, black_box(&xs), [(&w, &mut y)]);
                self.calls = (1e-3 / start.elapsed().as_secs_f64()).ceil().max(1.0) as usize;
            }
            let start = Instant::now();
            for _ in 0..self.calls {
                multiply(&team, black_box(&xs), [(&w, &mut y)]);
            }
            let seconds = start.elapsed().as_secs_f64() / self.calls as f64;
            black_box(&y);
            seconds
        });
        self.seconds.push(seconds.expect("threads"));
    }

    fn print(&mut self) {
        let s = median(&mut self.seconds);
        let macs = (self.rows * self.cols * self.tokens) as f64;
        println!(
            "{{\"what\": {:?}, \"kernel\": {:?}, \"cols\": {}, \"rows\": {}, \"tokens\": {}, \
             \"threads\": {}, \"gmac_per_s\": {:.3}, \"gb_per_s\": {:.3}}}",
            self.what,
            self.name,
            self.cols,
            self.rows,
            self.tokens,
            self.threads,
            macs / s / 1e9,
            self.n_bytes as f64 / s / 1e9,
        );
    }
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Rows of a whole number of row groups that take about `n_bytes`.
fn rows_of(kernel: &dyn Kernel, cols: usize, n_bytes: usize) -> usize {
    let layout = kernel.layout();
    (n_bytes / layout.group_bytes(cols)).max(1) * layout.row_group()
}

fn main() {
    // `cargo bench -- --test` wants to know that it runs; once, on small matrices.
    let test = std::env::args().any(|a| a == "--test");
    // `cargo test --benches` and the like pass a filter or `--list` to every bench.
    if std::env::args().any(|a| a == "--list") {
        return;
    }
    // Other words are parts of the names of kernels to be measured.
    let words: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with('-')).collect();
    let isa = Isa::best().expect("BITNET_RS_ISA is valid");
    let (rounds, cols, memory) =
        if test { (1, &COLS[..1], 1 << 20) } else { (7, &COLS[..], MEMORY) };
    let threads: &[usize] = &[1, 2];
    let mut cases: Vec<Case> = Vec::new();
    let case = |what, kernel: &'static dyn Kernel, name, cols, rows, tokens, threads| Case {
        what,
        name,
        kernel,
        cols,
        rows,
        tokens,
        threads,
        calls: usize::from(test),
        seconds: Vec::new(),
        n_bytes: 0,
    };
    for kernel in available(isa) {
        if !words.is_empty() && !words.iter().any(|word| kernel.name().contains(word)) {
            continue;
        }
        // Scalar kernels take minutes where others take milliseconds: one width, one thread.
        let scalar = kernel.name().starts_with("generic");
        for &cols in if scalar { &cols[..1] } else { cols } {
            let mut add = |what, rows, tokens, threads| {
                let name = kernel.name().to_owned();
                cases.push(case(what, kernel, name, cols, rows, tokens, threads));
            };
            add("gemv-cache", rows_of(kernel, cols, CACHE), 1, 1);
            if scalar {
                continue;
            }
            for &threads in threads {
                add("gemv-memory", rows_of(kernel, cols, memory), 1, threads);
                for tokens in if test { vec![4] } else { vec![4, 16, 512] } {
                    add("gemm", ROWS, tokens, threads);
                }
            }
        }
    }
    for levels in LEVELS {
        let kernels = available_for(isa, Levels::new(levels).expect("levels"));
        let kernel = kernels[0];
        if words.is_empty() || words.iter().any(|word| kernel.name().contains(word)) {
            let (isa, _) = kernel.name().split_once('-').expect("isa-format");
            let name = format!("{isa}-{}", kernel.layout().name());
            let rows = rows_of(kernel, COLS[0], CACHE);
            cases.push(case("elut-gemv", kernel, name.clone(), COLS[0], rows, 1, 1));
            cases.push(case("elut-gemm", kernel, name, COLS[0], ROWS, 16, 1));
        }
    }
    let mut reads = vec![Vec::new(); threads.len()];
    let mut dots = vec![Vec::new(); dot_peaks().len()];
    for round in 0..rounds {
        eprintln_progress(round, rounds);
        for (&n, read) in threads.iter().zip(&mut reads) {
            let team = Team::new(Some(n)).expect("threads");
            read.push(read_bandwidth(&team, isa, memory.max(1 << 20)).expect("memory"));
        }
        for ((_, peak), dot) in dot_peaks().into_iter().zip(&mut dots) {
            dot.push(peak());
        }
        for case in &mut cases {
            case.run(isa);
        }
    }
    for (n, read) in threads.iter().zip(&mut reads) {
        println!("{{\"what\": \"read\", \"threads\": {n}, \"gb_per_s\": {:.3}}}", median(read));
    }
    for ((name, _), dot) in dot_peaks().into_iter().zip(&mut dots) {
        println!(
            "{{\"what\": \"dot\", \"instruction\": {name:?}, \"gmac_per_s\": {:.3}}}",
            median(dot)
        );
    }
    for case in &mut cases {
        case.print();
    }
}

/// Long work shows progress, apart from its results.
#[allow(clippy::print_stderr)]
fn eprintln_progress(round: usize, rounds: usize) {
    eprintln!("round {} of {rounds}", round + 1);
}

/// A name, and what measures it in GMAC/s on one core.
type Peak = (&'static str, fn() -> f64);

/// The most multiply-adds that instructions of this machine can do, with no
/// memory in the way.
#[cfg(target_arch = "x86_64")]
fn dot_peaks() -> Vec<Peak> {
    let mut peaks: Vec<Peak> = Vec::new();
    if is_x86_feature_detected!("avx512vnni") {
        peaks.push(("vpdpbusd zmm", || {
            // SAFETY: the CPU has AVX-512 VNNI, as was just asked; registers only.
            peak(64 * 8, || unsafe {
                std::arch::asm!(
                    "vpdpbusd zmm16, zmm24, zmm25", "vpdpbusd zmm17, zmm24, zmm25",
                    "vpdpbusd zmm18, zmm24, zmm25", "vpdpbusd zmm19, zmm24, zmm25",
                    "vpdpbusd zmm20, zmm24, zmm25", "vpdpbusd zmm21, zmm24, zmm25",
                    "vpdpbusd zmm22, zmm24, zmm25", "vpdpbusd zmm23, zmm24, zmm25",
                    out("zmm16") _, out("zmm17") _, out("zmm18") _, out("zmm19") _,
                    out("zmm20") _, out("zmm21") _, out("zmm22") _, out("zmm23") _,
                    out("zmm24") _, out("zmm25") _,
                    options(nomem, nostack)
                );
            })
        }));
    }
    if is_x86_feature_detected!("avx2") {
        peaks.push(("vpmaddubsw + vpaddw ymm", || {
            // SAFETY: the CPU has AVX2, as was just asked; registers only.
            peak(32 * 6, || unsafe {
                std::arch::asm!(
                    "vpmaddubsw ymm6, ymm12, ymm13", "vpaddw ymm0, ymm0, ymm6",
                    "vpmaddubsw ymm7, ymm12, ymm13", "vpaddw ymm1, ymm1, ymm7",
                    "vpmaddubsw ymm8, ymm12, ymm13", "vpaddw ymm2, ymm2, ymm8",
                    "vpmaddubsw ymm9, ymm12, ymm13", "vpaddw ymm3, ymm3, ymm9",
                    "vpmaddubsw ymm10, ymm12, ymm13", "vpaddw ymm4, ymm4, ymm10",
                    "vpmaddubsw ymm11, ymm12, ymm13", "vpaddw ymm5, ymm5, ymm11",
                    out("ymm0") _, out("ymm1") _, out("ymm2") _, out("ymm3") _,
                    out("ymm4") _, out("ymm5") _, out("ymm6") _, out("ymm7") _,
                    out("ymm8") _, out("ymm9") _, out("ymm10") _, out("ymm11") _,
                    out("ymm12") _, out("ymm13") _,
                    options(nomem, nostack)
                );
            })
        }));
    }
    peaks
}

#[cfg(not(target_arch = "x86_64"))]
fn dot_peaks() -> Vec<Peak> {
    Vec::new()
}

/// GMAC/s of `step`, which does `macs` of them.
#[cfg(target_arch = "x86_64")]
fn peak(macs: usize, step: impl Fn()) -> f64 {
    const STEPS: usize = 4_000_000;
    let start = Instant::now();
    for _ in 0..STEPS {
        step();
    }
    (macs * STEPS) as f64 / start.elapsed().as_secs_f64() / 1e9
}
