//! Speed of the hot loops on the shapes of the 2B model, one thread:
//! `cargo bench`, or `cargo bench -- gemv`. Throughput is in weights (or keys)
//! a second. Run once as a test by `make test`.

use std::hint::black_box;

use bitnet_rs::cpu::Isa;
use bitnet_rs::kernels::{Kernels, PackedMatrix, Prepared, available, multiply};
use bitnet_rs::ops::dense::{DenseMatrix, StoredFloats};
use bitnet_rs::ternary::TernaryMatrix;
use bitnet_rs::threads::Team;
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};

/// Rows and columns of `down_proj` and `gate_proj`.
const SHAPES: [(usize, usize); 2] = [(2560, 6912), (6912, 2560)];

fn products(c: &mut Criterion) {
    let isa = Isa::best().expect("BITNET_RS_ISA is valid");
    let team = Team::new(Some(1)).expect("one thread");
    for (what, n) in [("gemv", 1), ("gemm-4", 4), ("gemm-16", 16), ("gemm-128", 128)] {
        let mut group = c.benchmark_group(what);
        for (rows, cols) in SHAPES {
            let trits: Vec<i8> = (0..rows * cols).map(|i| (i * i % 7 % 3) as i8 - 1).collect();
            let w = TernaryMatrix::new(&trits, rows, cols, 1.0).expect("trits");
            for kernel in available(isa) {
                if n > 16 && kernel.name().starts_with("generic") {
                    continue; // seconds a pass, and no news
                }
                let packed = PackedMatrix::pack(Kernels::of(kernel), &w, &team).expect("ternary");
                let mut xs = vec![Prepared::default(); n];
                for (t, x) in xs.iter_mut().enumerate() {
                    let input: Vec<f32> = (0..cols).map(|i| ((i + t) % 255) as f32).collect();
                    kernel.prepare(isa, &input, x);
                }
                let mut y = vec![0f32; n * rows];
                group.throughput(Throughput::Elements((n * rows * cols) as u64));
                group.bench_function(
                    BenchmarkId::new(kernel.name(), format!("{rows}x{cols}")),
                    |b| b.iter(|| multiply(&team, black_box(&xs), [(&packed, &mut y)])),
                );
            }
        }
        group.finish();
    }
}

fn head(c: &mut Criterion) {
    let (rows, cols) = (16_384, 2560);
    let data: Vec<u16> = (0..rows * cols).map(|i| 0x3c00 | (i % 512) as u16).collect();
    let team = Team::new(Some(1)).expect("one thread");
    let matrix = DenseMatrix::new(rows, cols, StoredFloats::Bf16(&data), &team).expect("finite");
    let x: Vec<f32> = (0..cols).map(|i| i as f32 / cols as f32).collect();
    let mut y = vec![0f32; rows];
    let mut group = c.benchmark_group("head");
    group.throughput(Throughput::Elements((rows * cols) as u64));
    for isa in Isa::available() {
        group.bench_function(BenchmarkId::new(isa.name(), format!("{rows}x{cols}")), |b| {
            b.iter(|| matrix.multiply(isa, 0..rows, black_box(&[&x]), &mut [&mut y]));
        });
    }
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(20).warm_up_time(std::time::Duration::from_millis(300)).measurement_time(std::time::Duration::from_secs(1));
    targets = products, head
}
criterion_main!(benches);
