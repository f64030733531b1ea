//! One runner for all kernels: whatever the machine has must give the bits of
//! a naive product, for every shape, number of inputs and number of threads.

mod common;

use bitnet_rs::cpu::Isa;
use bitnet_rs::kernels::{
    Activations, Kernel, Kernels, PackedMatrix, Prepared, available, available_for,
    available_grouped, by_name, multiply, multiply_pair,
};
use bitnet_rs::levels::{LevelMatrix, Levels};
use bitnet_rs::ternary::TernaryMatrix;
use bitnet_rs::threads::Team;
use proptest::prelude::*;

/// A small generator, so that a failing case can be told by its seed.
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        // SplitMix64.
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn trits(&mut self, n: usize) -> Vec<i8> {
        (0..n).map(|_| (self.next() % 3) as i8 - 1).collect()
    }

    fn one_of(&mut self, values: &[i8]) -> i8 {
        values[(self.next() % values.len() as u64) as usize]
    }

    fn floats(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| (self.next() % 20001) as f32 / 1e4 - 1.0).collect()
    }
}

/// The definition: an exact sum, divided by the activation's scale, times the
/// weights'.
fn naive(w: &TernaryMatrix<'_>, x: &[f32]) -> Vec<f32> {
    let a = x.iter().fold(1e-5f32, |a, v| a.max(v.abs()));
    let s = 1.0 / a * 127.0;
    let q: Vec<i64> =
        x.iter().map(|v| (v * s).round_ties_even().clamp(-128.0, 127.0) as i64).collect();
    let mut buffer = Vec::new();
    w.read(0..w.rows(), &mut buffer)
        .chunks_exact(w.cols())
        .map(|row| {
            let acc: i64 = row.iter().zip(&q).map(|(&t, &q)| i64::from(t) * q).sum();
            acc as f32 / s * w.scale()
        })
        .collect()
}

fn product(
    kernel: &'static dyn Kernel,
    w: &TernaryMatrix<'_>,
    xs: &[f32],
    team: &Team,
) -> Vec<f32> {
    let isa = Isa::best().unwrap();
    team.run(|| {
        let packed = PackedMatrix::pack(Kernels::of(kernel), w, team).unwrap();
        let mut prepared = vec![Prepared::default(); xs.len() / w.cols()];
        for (x, out) in xs.chunks_exact(w.cols()).zip(&mut prepared) {
            kernel.prepare(isa, x, out);
        }
        let mut y = vec![f32::NAN; prepared.len() * w.rows()];
        multiply(team, &prepared, [(&packed, &mut y)]);
        y
    })
    .unwrap()
}

fn bits(y: &[f32]) -> Vec<u32> {
    y.iter().map(|v| v.to_bits()).collect()
}

/// Every kernel against the definition.
fn check(trits: &[i8], rows: usize, cols: usize, xs: &[f32], threads: usize) {
    let w = TernaryMatrix::new(trits, rows, cols, 0.731).unwrap();
    let team = Team::new(Some(threads)).unwrap();
    let right: Vec<f32> = xs.chunks_exact(cols).flat_map(|x| naive(&w, x)).collect();
    for kernel in available(Isa::best().unwrap()) {
        let y = product(kernel, &w, xs, &team);
        let n = xs.len() / cols;
        assert_eq!(bits(&y), bits(&right), "{}: {rows} x {cols}, {n} inputs", kernel.name());
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 96 / common::one_in() as u32,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn every_kernel_gives_the_bits_of_the_definition(
        rows in 1usize..40,
        cols in prop_oneof![1usize..300, 1usize..3000],
        inputs in prop_oneof![Just(1usize), 1usize..20, 60usize..70],
        threads in 1usize..4,
        seed: u64,
    ) {
        let mut rng = Rng(seed);
        let (trits, xs) = (rng.trits(rows * cols), rng.floats(inputs * cols));
        check(&trits, rows, cols, &xs, threads);
    }
}

/// Several matrices at once, some of more rows than a kernel takes together, by numbers
/// of inputs around those at which kernels change their ways: cut by rows and by inputs.
#[test]
fn matrices_side_by_side_give_what_each_gives_alone() {
    let mut rng = Rng(7);
    let cols = 333;
    let isa = Isa::best().unwrap();
    let trits: Vec<Vec<i8>> = [5300, 37, 8].map(|rows| rng.trits(rows * cols)).into();
    let ws: Vec<TernaryMatrix<'_>> =
        trits.iter().map(|t| TernaryMatrix::new(t, t.len() / cols, cols, 0.25).unwrap()).collect();
    let xs = rng.floats(70 * cols);
    let right: Vec<Vec<u32>> = ws
        .iter()
        .map(|w| bits(&xs.chunks_exact(cols).flat_map(|x| naive(w, x)).collect::<Vec<_>>()))
        .collect();
    for kernel in available(isa) {
        if kernel.name().starts_with("generic") {
            continue; // what it gives is known from smaller ones, and slow here
        }
        for (n, threads) in [(9, 1), (13, 2), (16, 1), (17, 3), (33, 2), (48, 1), (70, 3)] {
            let team = Team::new(Some(threads)).unwrap();
            team.run(|| {
                let packed: Vec<_> = ws
                    .iter()
                    .map(|w| PackedMatrix::pack(Kernels::of(kernel), w, &team).unwrap())
                    .collect();
                let mut inputs = vec![Prepared::default(); n];
                for (x, out) in xs.chunks_exact(cols).zip(&mut inputs) {
                    kernel.prepare(isa, x, out);
                }
                let mut ys: Vec<Vec<f32>> =
                    ws.iter().map(|w| vec![f32::NAN; n * w.rows()]).collect();
                let [a, b, c] = &mut ys[..] else { unreachable!() };
                multiply(&team, &inputs, [(&packed[0], a), (&packed[1], b), (&packed[2], c)]);
                for (y, right) in ys.iter().zip(&right) {
                    assert!(bits(y) == right[..y.len()], "{}: {n} inputs", kernel.name());
                }
                // And two of one shape, with something done to both.
                let [a, b, ..] = &mut ys[..] else { unreachable!() };
                b.resize(a.len(), f32::NAN);
                multiply_pair(
                    &team,
                    &inputs,
                    [(&packed[0], &mut a[..]), (&packed[0], &mut b[..])],
                    |a, b| a.iter_mut().zip(b).for_each(|(a, b)| *a -= 2.0 * b),
                );
                assert!(
                    a.iter().zip(&right[0]).all(|(a, &r)| *a == -f32::from_bits(r)),
                    "{}: {n} inputs in pairs",
                    kernel.name()
                );
            })
            .unwrap();
        }
    }
}

#[test]
fn every_residue_of_the_block_size() {
    let mut rng = Rng(1);
    for cols in 1..=520 {
        let (trits, xs) = (rng.trits(5 * cols), rng.floats(3 * cols));
        check(&trits, 5, cols, &xs, 1);
    }
}

#[test]
fn widths_of_known_models() {
    let mut rng = Rng(2);
    for cols in [2560, 6912, 3200, 8640, 2048, 5460, 4096, 14336, 23040] {
        let (trits, xs) = (rng.trits(9 * cols), rng.floats(2 * cols));
        check(&trits, 9, cols, &xs, 2);
    }
}

/// Sums as large as they can become: weights of one sign, activations at the
/// ends of int8. 16-bit partial sums overflow here if they are widened too late.
#[test]
fn sums_at_the_bounds() {
    for cols in [64, 256, 2048, 2049, 6912, 131_071] {
        for sign in [1i8, -1] {
            let trits = vec![sign; 4 * cols];
            for x in [1.0f32, -1.0] {
                check(&trits, 4, cols, &vec![x; 2 * cols], 1);
            }
            let alternating: Vec<f32> =
                (0..2 * cols).map(|i| if i % 2 == 0 { 1.0 } else { -1.0 }).collect();
            check(&trits, 4, cols, &alternating, 1);
        }
    }
}

/// The same with activations that quantization hardly gives: -128 everywhere,
/// for which the 16-bit bounds are stated, is reached to the last unit (weights
/// +1 are codes 2), by each way that a kernel takes for few and many inputs.
#[test]
fn sums_at_the_bounds_of_int8() {
    let mut rng = Rng(6);
    let team = Team::new(Some(1)).unwrap();
    let isa = Isa::best().unwrap();
    let widths = [1280, 16, 2560, 64, 131_071, 256, 320, 1024, 1281, 6912];
    for cols in widths.into_iter().step_by(common::one_in()) {
        let rows = if cols > 10_000 { 4 } else { 9 };
        let random = rng.trits(rows * cols);
        for trits in [vec![1; rows * cols], vec![-1; rows * cols], random] {
            let w = TernaryMatrix::new(&trits, rows, cols, 0.5).unwrap();
            let ends =
                (0..cols).map(|_| if rng.next().is_multiple_of(2) { -128 } else { 127 }).collect();
            let pairs = (0..cols).map(|c| if c % 2 == 0 { -128 } else { 127 }).collect();
            // One field in four, so that no other field makes up for it.
            let field = |f| (0..cols).map(|c| if c / 64 % 4 == f { -128 } else { 127 }).collect();
            let inputs: Vec<Vec<i8>> = vec![
                vec![-128; cols],
                vec![127; cols],
                ends,
                pairs,
                field(0),
                field(1),
                field(2),
                field(3),
            ];
            let right: Vec<Vec<f32>> = inputs
                .iter()
                .map(|q| {
                    let sum = |row: &[i8]| -> i64 {
                        row.iter().zip(q).map(|(&t, &q)| i64::from(t) * i64::from(q)).sum()
                    };
                    trits.chunks_exact(cols).map(|row| sum(row) as f32 / 3.0 * w.scale()).collect()
                })
                .collect();
            for kernel in available(isa) {
                let packed = PackedMatrix::pack(Kernels::of(kernel), &w, &team).unwrap();
                for n in [1, 2, 3, 4, 5, 6, 8, 13, 70] {
                    if n > 13 && cols > 10_000 {
                        continue; // slow, and 13 inputs take the same way
                    }
                    let input = |t: usize| (t + n) % inputs.len();
                    let xs: Vec<Prepared> = (0..n)
                        .map(|t| {
                            let mut x = Prepared::from_values(&inputs[input(t)], 3.0);
                            kernel.build_table(&mut x);
                            x
                        })
                        .collect();
                    let mut y = vec![f32::NAN; n * rows];
                    multiply(&team, &xs, [(&packed, &mut y)]);
                    for (t, y) in y.chunks_exact(rows).enumerate() {
                        let right = &right[input(t)];
                        assert_eq!(bits(y), bits(right), "{} {rows} x {cols}, {n}", kernel.name());
                    }
                }
            }
        }
    }
}

/// The same for the five fields of t5, at widths around those of a block and of
/// the two and four blocks after which its kernels widen.
#[test]
fn sums_of_five_fields_at_the_bounds() {
    const FIELDS: usize = 5;
    let isa = Isa::best().unwrap();
    let team = Team::new(Some(1)).unwrap();
    for cols in [16, 80, 319, 320, 321, 639, 640, 641, 960, 1279, 1280, 1281, 2560, 6912] {
        for (t, field) in (0..2 * (FIELDS + 1)).map(|i| (i as i8 % 2 * 2 - 1, i / 2)) {
            let trits = vec![t; 5 * cols];
            let w = TernaryMatrix::new(&trits, 5, cols, 1.0).unwrap();
            // In one field of five, or everywhere.
            let low = |c: usize| field == FIELDS || c / 64 % FIELDS == field;
            let q: Vec<i8> = (0..cols).map(|c| if low(c) { -128 } else { 127 }).collect();
            let sum: i32 = q.iter().map(|&q| i32::from(t) * i32::from(q)).sum();
            let xs = vec![Prepared::from_values(&q, 1.0); 7];
            for kernel in available(isa).into_iter().filter(|k| k.layout().name() == "t5") {
                let packed = PackedMatrix::pack(Kernels::of(kernel), &w, &team).unwrap();
                for n in [1, 2, 7] {
                    let mut y = vec![0.0; n * 5];
                    team.run(|| multiply(&team, &xs[..n], [(&packed, &mut y)])).unwrap();
                    let name = kernel.name();
                    assert!(y.iter().all(|y| *y == sum as f32), "{name}: {n} x {cols}");
                }
            }
        }
    }
}

/// Four trits a byte, as `TernaryMatrix::from_quarters` takes them.
fn quarters(trits: &[i8], rows: usize, cols: usize) -> Vec<u8> {
    let quarter = rows.div_ceil(4);
    let mut bytes = vec![0; quarter * cols];
    for (r, row) in trits.chunks_exact(cols).enumerate() {
        for (byte, &t) in bytes[r % quarter * cols..].iter_mut().zip(row) {
            *byte |= ((t + 1) as u8) << (2 * (r / quarter));
        }
    }
    bytes
}

/// Packing and unpacking is the identity for every layout and shape, whichever
/// way the weights are stored.
#[test]
fn unpack_gives_the_weights_again() {
    let mut rng = Rng(5);
    let team = Team::new(Some(1)).unwrap();
    let known = [2560, 6912, 3200, 8640, 5460, 4096, 14336];
    let widths = (1..=70).chain([100, 255, 256, 257, 319, 320, 321, 500, 771]).chain(known);
    for cols in widths.step_by(common::one_in()) {
        for rows in [1, 2, 3, 4, 5, 8, 31, 33, 65] {
            let trits = rng.trits(rows * cols);
            let bytes = quarters(&trits, rows, cols);
            for w in [
                TernaryMatrix::new(&trits, rows, cols, 1.0).unwrap(),
                TernaryMatrix::from_quarters(&bytes, rows, cols, 1.0).unwrap(),
            ] {
                for kernel in available(Isa::best().unwrap()) {
                    let packed = PackedMatrix::pack(Kernels::of(kernel), &w, &team).unwrap();
                    let name = kernel.layout().name();
                    assert!(packed.unpack() == trits, "{name}: {rows} x {cols}");
                }
            }
        }
    }
}

/// Packing loses nothing: a one-hot input reads a column back.
#[test]
fn pack_keeps_every_weight() {
    let mut rng = Rng(3);
    for cols in [1, 17, 64, 100, 257, 500, 771] {
        let rows = 6;
        let trits = rng.trits(rows * cols);
        let w = TernaryMatrix::new(&trits, rows, cols, 1.0).unwrap();
        let mut hot = vec![0f32; cols * cols];
        (0..cols).for_each(|c| hot[c * cols + c] = 1.0);
        for kernel in available(Isa::best().unwrap()) {
            let y = product(kernel, &w, &hot, &Team::new(Some(1)).unwrap());
            for c in 0..cols {
                for r in 0..rows {
                    let t = f32::from(trits[r * cols + c]);
                    assert_eq!(y[c * rows + r], 127.0 * t / 127.0, "{} {r} {c}", kernel.name());
                }
            }
        }
    }
}

#[test]
fn quantizes_half_to_even_and_survives_zeros_and_tiny_values() {
    let isa = Isa::best().unwrap();
    let mut x = Prepared::default();
    // The largest is 127, so s is 1 up to rounding: 0.5 -> 0, 1.5 -> 2, 2.5 -> 2.
    x.quantize(isa, &[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]);
    assert_eq!(x.values(), [127, 0, 2, 2, 0, -2]);
    x.quantize(isa, &[0.0; 20]);
    assert_eq!(x.values(), [0; 20]);
    // Below the clamp of 1e-5 the scale stops growing.
    x.quantize(isa, &[1e-6, -1e-6, 1e-30]);
    assert_eq!(x.values(), [13, -13, 0]);
}

/// Preparing compiles for each instruction set too.
#[test]
fn quantize_gives_the_same_bits_on_every_isa() {
    let mut rng = Rng(4);
    for n in [1, 15, 16, 17, 500, 2560] {
        let x = rng.floats(n);
        let mut right = Prepared::default();
        right.quantize(Isa::GENERIC, &x);
        for isa in Isa::available() {
            let mut found = Prepared::default();
            found.quantize(isa, &x);
            assert_eq!(found.values(), right.values(), "{} {n}", isa.name());
        }
    }
}

/// The definition of a product with several scales (`generic/i2g.rs`).
fn naive_grouped(trits: &[i8], cols: usize, scales: &[f32], x: &[f32], divisor: f32) -> Vec<f32> {
    let groups = scales.len() / (trits.len() / cols);
    let at = |v: &[f32], i: usize| v.get(i).copied().unwrap_or(0.0);
    trits
        .chunks_exact(cols)
        .zip(scales.chunks_exact(groups))
        .map(|(row, scales)| {
            let mut total = 0f32;
            for block in 0..cols.div_ceil(64) {
                let word = |w: usize| {
                    (0..16).map(|j| block * 64 + w * 16 + j).fold(0f32, |sum, c| {
                        sum + f32::from(row.get(c).copied().unwrap_or(0)) * at(x, c)
                    })
                };
                let sum = (word(0) + word(1)) + (word(2) + word(3));
                total = scales[block * 64 / (cols / groups)].mul_add(sum, total);
            }
            total / divisor
        })
        .collect()
}

#[test]
fn grouped_kernels_give_the_bits_of_their_definition() {
    let isa = Isa::best().unwrap();
    let mut rng = Rng(11);
    for (rows, cols, groups) in
        [(1, 1, 1), (16, 64, 1), (5, 100, 1), (37, 256, 4), (33, 384, 3), (50, 330, 1), (3, 128, 2)]
    {
        let trits = rng.trits(rows * cols);
        let scales: Vec<f32> = rng.floats(rows * groups);
        let w = TernaryMatrix::new(&trits, rows, cols, 1.0).unwrap();
        let w = w.with_group_scales(&scales).unwrap();
        for n in [1, 2, 5, 9] {
            let xs = rng.floats(n * cols);
            for activations in [Activations::Float, Activations::Int8] {
                let right: Vec<f32> = xs
                    .chunks_exact(cols)
                    .flat_map(|x| match activations {
                        Activations::Float => naive_grouped(&trits, cols, &scales, x, 1.0),
                        Activations::Int8 => {
                            let mut q = Prepared::default();
                            q.quantize(isa, x);
                            let a = x.iter().fold(1e-5f32, |a, v| a.max(v.abs()));
                            let x: Vec<f32> = q.values().iter().map(|&q| f32::from(q)).collect();
                            naive_grouped(&trits, cols, &scales, &x, 1.0 / a * 127.0)
                        }
                    })
                    .collect();
                for kernel in available_grouped(isa, activations) {
                    assert_eq!(kernel.activations(), activations);
                    for threads in [1, 3] {
                        let team = Team::new(Some(threads)).unwrap();
                        let found = product(kernel, &w, &xs, &team);
                        assert_eq!(
                            bits(&found),
                            bits(&right),
                            "{} {rows} x {cols}, {groups} groups, {n} inputs",
                            kernel.name()
                        );
                    }
                }
            }
        }
    }
}

/// One scale and int8 activations: what other kernels compute, but for roundings.
#[test]
fn grouped_kernels_agree_with_the_others_where_both_may_be_used() {
    let isa = Isa::best().unwrap();
    let team = Team::new(Some(2)).unwrap();
    let (rows, cols) = (20, 300);
    let mut rng = Rng(12);
    let (trits, x) = (rng.trits(rows * cols), rng.floats(cols));
    let w = TernaryMatrix::new(&trits, rows, cols, 0.37).unwrap();
    let right = naive(&w, &x);
    for kernel in available_grouped(isa, Activations::Int8) {
        for (found, right) in product(kernel, &w, &x, &team).iter().zip(&right) {
            assert!((found - right).abs() <= 1e-5 * right.abs().max(1.0), "{}", kernel.name());
        }
    }
}

#[test]
fn scales_that_a_layout_does_not_hold_are_refused() {
    let team = Team::new(Some(1)).unwrap();
    let isa = Isa::best().unwrap();
    let (trits, scales) = (vec![1i8; 4 * 96], vec![0.5f32; 12]);
    let w = TernaryMatrix::new(&trits, 4, 96, 1.0).unwrap();
    for wrong in [&scales[..3], &scales[..7], &[f32::NAN; 4], &[0.5; 4 * 7]] {
        assert!(w.with_group_scales(wrong).is_err());
    }
    let pack = |kernel, scales| {
        let w = w.with_group_scales(scales).unwrap();
        team.run(|| PackedMatrix::pack(Kernels::of(kernel), &w, &team).err().map(|e| e.to_string()))
            .unwrap()
    };
    for kernel in available(isa) {
        assert!(pack(kernel, &scales[..4]).unwrap().contains("i2g"));
    }
    let grouped = available_grouped(isa, Activations::Float)[0];
    assert_eq!(pack(grouped, &scales[..4]), None);
    // Three groups of 32 columns.
    assert!(pack(grouped, &scales).unwrap().contains("multiple of 64"));
    let other = available_grouped(isa, Activations::Int8)[0];
    let mut kernels = [grouped; 6];
    kernels[5] = other;
    assert!(Kernels::new(kernels).is_err());
}

#[test]
fn kernels_are_found_by_name() {
    let isa = Isa::best().unwrap();
    let names: Vec<_> = available(isa).iter().map(|k| k.name()).collect();
    assert_eq!(names.last(), Some(&"generic-i2"));
    for name in &names {
        assert_eq!(by_name(isa, Activations::Int8, Some(name)).unwrap().name(), *name);
    }
    assert_eq!(by_name(isa, Activations::Int8, None).unwrap().name(), names[0]);
    let error = by_name(isa, Activations::Int8, Some("nope")).err().unwrap().to_string();
    assert!(error.contains("nope") && error.contains("generic-i2"), "{error}");
    let lowest: Vec<_> = available(Isa::GENERIC).iter().map(|k| k.name()).collect();
    assert!(lowest.iter().all(|name| name.starts_with("generic-")), "{lowest:?}");
}

/// Levels of all kinds: symmetric and not, with zero and without, large.
const LEVELS: [&[i8]; 14] = [
    &[-1, 1],
    &[0, 1],
    &[-127, 127],
    &[-1, 0, 1],
    &[-5, 0, 5],
    &[0, 1, 2],
    &[-31, -1, 7],
    &[-3, -1, 1, 3],
    &[-2, -1, 0, 1],
    &[-2, -1, 0, 1, 2],
    &[-15, -3, 0, 3, 15],
    &[-2, -1, 0, 1, 2, 3],
    &[-7, -5, -3, -1, 1, 3, 5, 7],
    &[-127, -64, -8, -1, 0, 63, 100, 127],
];

/// Every kernel of a matrix of levels against the definition, for quantized
/// inputs of all int8 values.
fn check_levels(w: LevelMatrix<'_>, inputs: &[Vec<i8>], threads: usize) {
    let team = Team::new(Some(threads)).unwrap();
    let divisor = 3.7f32;
    let (mut right, mut buffer) = (Vec::new(), Vec::new());
    for q in inputs {
        for row in w.read(0..w.rows(), &mut buffer).chunks_exact(w.cols()) {
            let products = row.iter().zip(q).map(|(&v, &q)| i64::from(v) * i64::from(q));
            right.push(products.sum::<i64>() as f32 / divisor * w.scale());
        }
    }
    for kernel in available_for(Isa::best().unwrap(), w.levels()) {
        let y = team
            .run(|| {
                let packed = PackedMatrix::pack(Kernels::of(kernel), w, &team).unwrap();
                let xs: Vec<Prepared> = (inputs.iter())
                    .map(|q| {
                        let mut x = Prepared::from_values(q, divisor);
                        kernel.build_table(&mut x);
                        x
                    })
                    .collect();
                let mut y = vec![f32::NAN; right.len()];
                multiply(&team, &xs, [(&packed, &mut y)]);
                y
            })
            .unwrap();
        let (name, layout) = (kernel.name(), kernel.layout().name());
        let (rows, cols, n) = (w.rows(), w.cols(), inputs.len());
        assert_eq!(bits(&y), bits(&right), "{name} on {layout}: {rows} x {cols}, {n} inputs");
    }
}

fn any_levels() -> impl Strategy<Value = Levels> {
    let random = prop::collection::btree_set(-127i8..=127, 2..=8)
        .prop_map(|set| set.into_iter().collect::<Vec<_>>());
    // Opposites of a few magnitudes, with zero or without.
    let symmetric =
        (prop::collection::btree_set(1i8..=127, 1..=4), any::<bool>()).prop_map(|(half, zero)| {
            let zero = (zero && half.len() < 4).then_some(0);
            half.iter().map(|v| -v).chain(zero).chain(half.iter().copied()).collect::<Vec<_>>()
        });
    let known = prop::sample::select(&LEVELS[..]).prop_map(<[i8]>::to_vec);
    prop_oneof![known, random, symmetric].prop_map(|values| Levels::new(&values).unwrap())
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 192 / common::one_in() as u32,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn kernels_of_all_levels_give_the_bits_of_the_definition(
        levels in any_levels(),
        rows in prop_oneof![1usize..100, Just(128), Just(160)],
        cols in prop_oneof![1usize..100, 1usize..1000],
        inputs in prop_oneof![Just(1usize), 1usize..16],
        threads in 1usize..3,
        seed: u64,
    ) {
        let mut rng = Rng(seed);
        let values: Vec<i8> = (0..rows * cols).map(|_| rng.one_of(levels.values())).collect();
        let w = LevelMatrix::new(&values, rows, cols, 0.731, levels).unwrap();
        let inputs: Vec<Vec<i8>> =
            (0..inputs).map(|_| (0..cols).map(|_| rng.next() as i8).collect()).collect();
        check_levels(w, &inputs, threads);
        let team = Team::new(Some(1)).unwrap();
        for kernel in available_for(Isa::best().unwrap(), levels) {
            let packed = PackedMatrix::pack(Kernels::of(kernel), w, &team).unwrap();
            prop_assert!(packed.unpack() == values, "{}", kernel.layout().name());
        }
    }
}

/// Sums at the bounds of every width: all weights the level of the largest
/// magnitude, all activations at an end of int8, so that every entry, every run
/// of digits and every int16 sum is as large as it can become.
#[test]
fn sums_of_levels_at_the_bounds() {
    for values in LEVELS {
        let levels = Levels::new(values).unwrap();
        let most = ((1usize << 24) - 1) / (128 * levels.max_abs() as usize);
        for cols in [7, 48, 96, 1032, 6912.min(most), most.min(43_690)] {
            for level in [values[0], values[values.len() - 1]] {
                let weights = vec![level; 3 * cols];
                let w = LevelMatrix::new(&weights, 3, cols, 1.0, levels).unwrap();
                let alternating = (0..cols).map(|c| if c % 2 == 0 { 127 } else { -128 });
                let inputs = [vec![-128; cols], vec![127; cols], alternating.collect()];
                check_levels(w, &inputs[..1], 1);
                check_levels(w, &inputs, 1);
            }
        }
    }
}

/// A matrix of levels has kernels and layouts of its own, made once.
#[test]
fn levels_have_their_kernels() {
    let isa = Isa::best().unwrap();
    let names = |levels, isa| -> Vec<_> {
        available_for(isa, levels).iter().map(|k| (k.name(), k.layout().name())).collect()
    };
    let ternary: Vec<_> = available(isa).iter().map(|k| (k.name(), k.layout().name())).collect();
    assert_eq!(names(Levels::TERNARY, isa), ternary);
    let four = Levels::new(&[3, 1, -1, -3]).unwrap();
    let found = names(four, isa);
    assert_eq!(found.last(), Some(&("generic-elut", "elut(-3,-1,1,3)")));
    assert_eq!(names(four, Isa::GENERIC), [("generic-elut", "elut(-3,-1,1,3)")]);
    let again = names(four, isa);
    assert!(found.iter().zip(&again).all(|(a, b)| std::ptr::eq(a.1, b.1)));

    // Ternary kernels take no other levels, nor the other way around.
    let team = Team::new(Some(1)).unwrap();
    let w = LevelMatrix::new(&[3, -1], 1, 2, 1.0, four).unwrap();
    let error = PackedMatrix::pack(Kernels::of(available(isa)[0]), w, &team).err().unwrap();
    assert!(error.to_string().contains("[-3, -1, 1, 3]"), "{error}");
    let w = TernaryMatrix::new(&[1, -1], 1, 2, 1.0).unwrap();
    assert!(PackedMatrix::pack(Kernels::of(available_for(isa, four)[0]), &w, &team).is_err());
}
