//! Speed of the hot loops on the shapes of the 2B, 3B and 8B models, one
//! thread, weights in the cache where they fit: `cargo bench --bench kernels`,
//! with a filter such as `-- 'gemv/avx2-t5'`. For working on a kernel; the
//! comparison of all of them beside the machine's limits is kernel_table.rs.
//! Throughput is in multiply-adds (or weights of the head) a second. Run once
//! as a test, on one small shape, by `make test`.

use std::hint::black_box;

use bitnet_rs::cpu::Isa;
use bitnet_rs::floats::Bf16;
use bitnet_rs::kernels::{Kernels, PackedMatrix, Prepared, available, multiply};
use bitnet_rs::ops::dense::{DenseMatrix, Floats};
use bitnet_rs::threads::Team;
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};

/// Rows and columns of o, gate (and up) and down of the three models.
const SHAPES: [(usize, usize); 9] = [
    (2560, 2560),
    (6912, 2560),
    (2560, 6912),
    (3200, 3200),
    (8640, 3200),
    (3200, 8640),
    (4096, 4096),
    (14336, 4096),
    (4096, 14336),
];

/// Rows of a GEMM: what decides there is arithmetic, the same for every row.
const GEMM_ROWS: usize = 512;

fn products(c: &mut Criterion) {
    let isa = Isa::best().expect("BITNET_RS_ISA is valid");
    let team = Team::new(Some(1)).expect("one thread");
    let test = std::env::args().any(|a| a == "--test");
    let shapes = if test { &[(64, 700)][..] } else { &SHAPES };
    for (what, n) in [("gemv", 1), ("gemm-4", 4), ("gemm-16", 16), ("gemm-512", 512)] {
        let mut group = c.benchmark_group(what);
        for &(rows, cols) in shapes {
            let rows = if n == 1 { rows } else { rows.min(GEMM_ROWS) };
            for kernel in available(isa) {
                if !test && n > 1 && kernel.name().starts_with("generic") {
                    continue; // seconds a pass, and no news
                }
                let packed = PackedMatrix::arbitrary(Kernels::of(kernel), rows, cols, &team);
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
    let data: Vec<_> = (0..rows * cols).map(|i| Bf16(0x3c00 | (i % 512) as u16)).collect();
    let team = Team::new(Some(1)).expect("one thread");
    let data = Floats::Bf16(std::sync::Arc::new(data));
    let matrix = DenseMatrix::new(rows, cols, data, Isa::GENERIC, &team).expect("finite");
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
