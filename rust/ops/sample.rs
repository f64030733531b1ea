//! Draws a token from a row of logits: temperature, top-k, top-p and min-p, in
//! integers.
//!
//! A token's weight is `floor(2^40 e^((l - highest) / T))`. The exponential is
//! the float32 of [`super::exp`], so a weight has at most 24 bits, and float32
//! holds it exactly. What is kept and what is drawn depends on sums of weights
//! alone, and integers add up to the same in any order: every instruction set
//! draws the same token. One below 2^-40 of the best is never drawn.
//!
//! The slow twin, which sorts, is `sample` in `_reference.py`. Nothing here
//! sorts a vocabulary: `cut` finds the last of the highest values by counting
//! them in buckets, over all that could be meant. For top-k those are the values
//! not below the k-th of the maxima of 2048 groups; for top-p, those not so light
//! that all of the kind together could go.

use super::exp::exp;
use crate::cpu::Isa;
use crate::error::{Error, invalid};

/// The weight of the best token. Weights keep all bits of their float32 down to
/// 2^-17 of it.
const BEST: f32 = (1u64 << 40) as f32;

/// The most logits in a row, so that weights add up to 2^63 at most.
const MAX_LOGITS: usize = 1 << 23;

/// Groups of logits whose maxima are taken: the j-th has every 2048-th logit
/// from the j-th on, so that no lanes need shuffling. More than any usual
/// `top_k`, and little enough for the first-level cache.
const GROUPS: usize = 2048;

/// Weights that are computed, and added up, at a time.
const BLOCK: usize = 1024;

/// Values of which [`cut`] and [`top_k`] first ask whether any is meant. In most
/// chunks of a language model's row none is; in longer ones, one more often.
const CHUNK: usize = 32;

/// Buckets of a round of [`cut`]: 8 KiB a copy.
const BUCKET_BITS: u32 = 10;

/// Copies of the buckets, taken in turn: an addition to the bucket of the value
/// before would wait for that one. With one copy rows of a few values take a
/// sixth longer; adding up four costs more than they save.
const COPIES: usize = 2;

/// Which tokens may be drawn, and how probable each is. [`sample`] applies the
/// fields in this order.
#[derive(Clone, Copy, Debug)]
pub struct Sampling {
    /// Divides the logits; above 0.
    pub temperature: f64,
    /// Keeps the k highest logits, lower positions first among equals; 0 keeps
    /// all.
    pub top_k: usize,
    /// Keeps the shortest run of the largest weights, lower positions first
    /// among equals, whose sum is at least `top_p` times that of all that are
    /// left, rounded up (see `nucleus`); 1 keeps all.
    pub top_p: f64,
    /// Keeps weights of at least this fraction of the best; 0 keeps all.
    pub min_p: f64,
}

impl Sampling {
    fn check(&self) -> Result<(), Error> {
        let Self { temperature, top_p, min_p, .. } = *self;
        if !(temperature > 0.0 && temperature.is_finite()) {
            return Err(invalid!("temperature is {temperature}; wanted a number above 0"));
        }
        if !(top_p > 0.0 && top_p <= 1.0) {
            return Err(invalid!("top_p is {top_p}; wanted a number above 0, up to 1"));
        }
        if !(0.0..=1.0).contains(&min_p) {
            return Err(invalid!("min_p is {min_p}; wanted a number from 0 to 1"));
        }
        Ok(())
    }
}

/// A position of `logits`, chosen by `draw`, a uniform number in [0, 1): the
/// first at which the running sum of the kept weights exceeds `draw` times the
/// sum of all of them (in float64, rounded down).
///
/// # Errors
/// An argument out of range, or, as [`Error::State`], logits that hold NaN or
/// +inf, or nothing above -inf.
pub fn sample(isa: Isa, logits: &[f32], sampling: Sampling, draw: f64) -> Result<usize, Error> {
    sampling.check()?;
    if !(0.0..1.0).contains(&draw) {
        return Err(invalid!("draw is {draw}; wanted a number from 0 to below 1"));
    }
    if logits.is_empty() || logits.len() > MAX_LOGITS {
        return Err(invalid!("there are {} logits; wanted 1 to {MAX_LOGITS}", logits.len()));
    }
    let maxima = maxima(isa, logits)?;
    let highest = highest(&maxima);
    if sampling.top_k == 0 || sampling.top_k >= logits.len() {
        return Ok(choose(isa, logits, highest, sampling, draw));
    }
    let kept = top_k(isa, logits, &maxima, sampling.top_k);
    let logits: Vec<f32> = kept.iter().map(|&i| logits[i]).collect();
    Ok(kept[choose(isa, &logits, highest, sampling, draw)])
}

/// [`sample`] from where top-k is done.
fn choose(isa: Isa, logits: &[f32], highest: f32, sampling: Sampling, draw: f64) -> usize {
    let weights = weigh(isa, logits, highest, sampling.temperature);
    let mut kept = Kept::ALL;
    if sampling.top_p < 1.0 {
        kept = nucleus(isa, &weights, sampling.top_p);
    }
    let least = least_weight(sampling.min_p);
    if least > kept.last {
        kept = Kept { last: least, equals: usize::MAX };
    }
    let blocks = add_up(isa, &weights, kept);
    let sum = total(&blocks);
    // Rounded to float64, the product with a draw below 1 may reach the sum.
    let mut left = ((draw * sum as f64) as u64).min(sum - 1);
    for (block, weights) in blocks.iter().zip(weights.chunks(BLOCK)) {
        if left >= block.sum {
            left -= block.sum;
            continue;
        }
        kept.equals = block.equals;
        for (i, &w) in weights.iter().enumerate() {
            let weight = if kept.takes(w) { whole(w) } else { 0 };
            if left < weight {
                return block.start + i;
            }
            left -= weight;
        }
    }
    unreachable!("what is left is below the sum")
}

/// The values that are kept: all above one, and the first few that equal it.
#[derive(Clone, Copy)]
struct Kept {
    last: f32,
    equals: usize,
}

impl Kept {
    /// All weights that can be drawn.
    const ALL: Self = Self { last: 0.0, equals: 0 };

    /// Whether the next value is kept. Asked of the values in order.
    fn takes(&mut self, v: f32) -> bool {
        let equal = v == self.last && self.equals > 0;
        self.equals -= usize::from(equal);
        equal || v > self.last
    }
}

/// The maxima of the groups of logits.
fn maxima(isa: Isa, logits: &[f32]) -> Result<[f32; GROUPS], Error> {
    let mut maxima = [f32::NEG_INFINITY; GROUPS];
    let bad = isa.vectorize(
        #[inline(always)]
        || {
            let mut bad = 0;
            for round in logits.chunks(GROUPS) {
                for (highest, &l) in maxima.iter_mut().zip(round) {
                    *highest = highest.max(l);
                    bad |= u32::from(l.is_nan() | (l == f32::INFINITY));
                }
            }
            bad
        },
    );
    if bad != 0 || highest(&maxima) == f32::NEG_INFINITY {
        return Err(Error::State(
            "the logits hold NaN or +inf, or nothing above -inf; wanted finite ones".to_owned(),
        ));
    }
    Ok(maxima)
}

fn highest(maxima: &[f32]) -> f32 {
    maxima.iter().copied().fold(f32::NEG_INFINITY, f32::max)
}

/// The weight of each logit. Dividing by the temperature is a product with its
/// reciprocal, both in float64: there no difference of two float32 overflows,
/// and no reciprocal is 0. That of the smallest temperatures is infinite, and
/// 0 times infinity no number, so the largest number stands for it.
fn weigh(isa: Isa, logits: &[f32], highest: f32, temperature: f64) -> Vec<f32> {
    let (highest, reciprocal) = (f64::from(highest), (1.0 / temperature).min(f64::MAX));
    let mut weights = vec![0f32; logits.len()];
    isa.vectorize(
        #[inline(always)]
        || {
            // Two loops: in one, float64 would halve the lanes of `exp`.
            for (weights, logits) in weights.chunks_mut(BLOCK).zip(logits.chunks(BLOCK)) {
                for (w, &l) in weights.iter_mut().zip(logits) {
                    *w = ((f64::from(l) - highest) * reciprocal) as f32;
                }
                for w in weights {
                    *w = (exp(*w) * BEST).floor();
                }
            }
        },
    );
    weights
}

/// A weight as an integer: it stands in the lowest bits of 2^52 + w. There is no
/// vector instruction for the conversion before AVX-512.
#[inline(always)]
fn whole(w: f32) -> u64 {
    const SHIFT: f64 = (1u64 << 52) as f64;
    (f64::from(w) + SHIFT).to_bits() - SHIFT.to_bits()
}

/// The smallest float32 that is not below `min_p` of the best weight, rounded up
/// to an integer.
fn least_weight(min_p: f64) -> f32 {
    let least = (min_p * f64::from(BEST)).ceil();
    let rounded = least as f32;
    if f64::from(rounded) < least { rounded.next_up() } else { rounded }
}

/// A block of weights: where it starts, the sum of those that are kept, and how
/// many equals of the last are still to be taken there.
struct Block {
    start: usize,
    sum: u64,
    equals: usize,
}

fn add_up(isa: Isa, weights: &[f32], kept: Kept) -> Vec<Block> {
    let mut blocks = Vec::with_capacity(weights.len().div_ceil(BLOCK));
    let mut left = kept.equals;
    isa.vectorize(
        #[inline(always)]
        || {
            for (n, block) in weights.chunks(BLOCK).enumerate() {
                let (mut sum, mut equals) = (0, 0u32);
                for &w in block {
                    sum += if w > kept.last { whole(w) } else { 0 };
                    equals += u32::from(w == kept.last);
                }
                let taken = left.min(equals as usize);
                sum += taken as u64 * whole(kept.last);
                blocks.push(Block { start: n * BLOCK, sum, equals: left });
                left -= taken;
            }
        },
    );
    blocks
}

fn total(blocks: &[Block]) -> u64 {
    blocks.iter().map(|block| block.sum).sum()
}

/// Positions of the k highest logits, ascending; k is below their number.
fn top_k(isa: Isa, logits: &[f32], maxima: &[f32], k: usize) -> Vec<usize> {
    // At least k logits are not below the k-th maximum: those of k groups.
    let lowest = if k <= maxima.len() {
        let mut maxima = maxima.to_vec();
        *maxima.select_nth_unstable_by(k - 1, |a, b| b.total_cmp(a)).1
    } else {
        f32::NEG_INFINITY
    };
    let mut kept = cut(isa, logits, (lowest, highest(maxima)), k as u64, |_| 1);
    let mut positions = Vec::with_capacity(k);
    isa.vectorize(
        #[inline(always)]
        || {
            for (n, chunk) in logits.chunks(CHUNK).enumerate() {
                let more = kept.equals > 0;
                if any(chunk, |l| (l > kept.last) | ((l == kept.last) & more)) {
                    let start = n * CHUNK;
                    positions.extend(
                        (0..chunk.len()).filter(|&i| kept.takes(chunk[i])).map(|i| start + i),
                    );
                }
            }
        },
    );
    positions
}

/// What top-p keeps. The sum it has to reach is computed in float64, which
/// rounds sums above 2^53, by less than 2^-52 of them.
fn nucleus(isa: Isa, weights: &[f32], top_p: f64) -> Kept {
    let sum = total(&add_up(isa, weights, Kept::ALL));
    let wanted = ((top_p * sum as f64).ceil() as u64).clamp(1, sum);
    // All weights below the quotient together are less than what may be left
    // out, so the others reach what is wanted. (Half of it: no rounding matters.)
    let lowest = ((sum - wanted) / weights.len() as u64) as f32 / 2.0;
    cut(isa, weights, (lowest.max(1.0), BEST), wanted, whole)
}

/// Whether any value is meant. Asks all of them, without branches.
#[inline(always)]
fn any(values: &[f32], meant: impl Fn(f32) -> bool) -> bool {
    values.iter().fold(0, |any, &v| any | u32::from(meant(v))) != 0
}

/// An integer in the order of floats. -0 + 0 is 0: the two are equal.
#[inline(always)]
fn key(v: f32) -> u32 {
    let bits = (v + 0.0).to_bits();
    bits ^ ((bits as i32 >> 31) as u32 | 1 << 31)
}

/// The float of a [`key`].
fn from_key(key: u32) -> f32 {
    f32::from_bits(key ^ ((!key as i32 >> 31) as u32 | 1 << 31))
}

/// The fewest of the highest values, earlier ones first among equals, whose
/// measures add up to `wanted`. That happens within `range`, from the lowest to
/// the highest, both included; nothing is above it, and no measure there is 0.
///
/// In rounds: the range is cut in buckets of keys, and the bucket in which the
/// sum is reached is the next range, until it has one value only.
#[inline(always)]
fn cut(
    isa: Isa,
    values: &[f32],
    range: (f32, f32),
    mut wanted: u64,
    measure: impl Fn(f32) -> u64,
) -> Kept {
    const BUCKETS: usize = 1 << BUCKET_BITS;
    let (mut lowest, mut highest) = (key(range.0), key(range.1));
    loop {
        if lowest < highest {
            (lowest, highest) = tighten(isa, values, lowest, highest);
        }
        if lowest == highest {
            let last = from_key(highest);
            return Kept { last, equals: wanted.div_ceil(measure(last)) as usize };
        }
        let width = highest - lowest;
        let shift = (u32::BITS - width.leading_zeros()).saturating_sub(BUCKET_BITS);
        let mut copies = [[0u64; BUCKETS]; COPIES];
        isa.vectorize(
            #[inline(always)]
            || {
                let (low, high) = (from_key(lowest), from_key(highest));
                for chunk in values.chunks(CHUNK) {
                    if !any(chunk, |v| (v >= low) & (v <= high)) {
                        continue;
                    }
                    let (mut buckets, mut measures) = ([0u32; CHUNK], [0u64; CHUNK]);
                    for ((bucket, m), &v) in buckets.iter_mut().zip(&mut measures).zip(chunk) {
                        // Wraps above the range.
                        let below = highest.wrapping_sub(key(v));
                        *bucket = below >> shift;
                        *m = if below <= width { measure(v) } else { 0 };
                    }
                    for i in 0..CHUNK {
                        copies[i % COPIES][buckets[i] as usize % BUCKETS] += measures[i];
                    }
                }
            },
        );
        let mut bucket = 0;
        loop {
            let sum = copies.iter().map(|buckets| buckets[bucket]).sum();
            if wanted <= sum {
                break;
            }
            wanted -= sum;
            bucket += 1;
        }
        highest -= (bucket as u32) << shift;
        lowest = lowest.max(highest.saturating_sub((1 << shift) - 1));
    }
}

/// The lowest and the highest key of the values in a range that has some. Rows
/// of few or close values are cut in one round thanks to it.
fn tighten(isa: Isa, values: &[f32], lowest: u32, highest: u32) -> (u32, u32) {
    // Outside the range one of the differences wraps, and is not the least.
    let (up, down) = isa.vectorize(
        #[inline(always)]
        || {
            values.iter().fold((u32::MAX, u32::MAX), |(up, down), &v| {
                (up.min(key(v).wrapping_sub(lowest)), down.min(highest.wrapping_sub(key(v))))
            })
        },
    );
    (lowest + up, highest - down)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::{Just, Strategy, prop, prop_assert_eq, prop_oneof, proptest};

    use super::*;

    const OFF: Sampling = Sampling { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0 };

    /// The definition, by sorting.
    fn twin(logits: &[f32], sampling: Sampling, draw: f64) -> usize {
        let Sampling { temperature, top_k, top_p, min_p } = sampling;
        let highest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let weights = weigh(Isa::GENERIC, logits, highest, temperature);
        let mut kept: Vec<usize> = (0..logits.len()).collect();
        kept.sort_by(|&a, &b| logits[b].partial_cmp(&logits[a]).expect("numbers"));
        kept.truncate(if top_k == 0 { logits.len() } else { top_k });
        kept.sort_unstable();
        kept.sort_by(|&a, &b| weights[b].total_cmp(&weights[a]));
        let weight = |i: usize| weights[i] as u64;
        if top_p < 1.0 {
            let sum: u64 = kept.iter().map(|&i| weight(i)).sum();
            let (wanted, mut reached) = ((top_p * sum as f64).ceil() as u64, 0);
            kept.retain(|&i| {
                let needed = reached == 0 || reached < wanted;
                reached += weight(i);
                needed
            });
        }
        kept.retain(|&i| weight(i) >= (min_p * 2f64.powi(40)).ceil() as u64);
        kept.sort_unstable();
        let sum: u64 = kept.iter().map(|&i| weight(i)).sum();
        let (mut reached, drawn) = (0, (draw * sum as f64) as u64);
        let place = kept.iter().find(|&&i| {
            reached += weight(i);
            reached > drawn.min(sum - 1)
        });
        *place.expect("one reaches the sum")
    }

    /// Rows of any size around those of blocks, chunks and groups; spread or
    /// close, with equals and without.
    fn rows() -> impl Strategy<Value = Vec<f32>> {
        let n = prop_oneof![1..100usize, 1000..1100usize, 2000..5000usize];
        let spread =
            prop_oneof![Just(0.0), Just(1e-6), Just(0.3), Just(5.0), Just(40.0), Just(1.6e38)];
        let step = prop_oneof![Just(0.0f32), Just(0.5), Just(8.0)];
        (n, spread, step, 0..u64::MAX).prop_map(|(n, spread, step, seed)| {
            let mut state = seed | 1;
            let mut row: Vec<f32> = (0..n)
                .map(|_| {
                    state ^= state << 13;
                    state ^= state >> 7;
                    state ^= state << 17;
                    let v = ((state >> 40) as f32 / (1u32 << 23) as f32 - 1.0) * spread;
                    if state % 17 == 0 {
                        f32::NEG_INFINITY
                    } else if step > 0.0 {
                        (v / step).round() * step
                    } else {
                        v
                    }
                })
                .collect();
            row[n / 2] = -0.0;
            row
        })
    }

    fn samplings() -> impl Strategy<Value = Sampling> {
        let temperature = prop_oneof![
            Just(5e-324),
            Just(1e-40),
            Just(0.01),
            Just(0.7),
            Just(1.0),
            Just(3.0),
            Just(1e5),
            Just(1e300)
        ];
        let top_k = prop_oneof![Just(0usize), 1..100usize, 2000..5000usize];
        let top_p = prop_oneof![Just(1.0), Just(5e-324), Just(0.999_999), 0.01..1.0f64];
        let min_p = prop_oneof![Just(0.0), Just(1.0), Just(1e-13), 0.0..1.0f64];
        (temperature, top_k, top_p, min_p).prop_map(|(temperature, top_k, top_p, min_p)| Sampling {
            temperature,
            top_k,
            top_p,
            min_p,
        })
    }

    proptest! {
        #[test]
        fn every_instruction_set_draws_the_token_of_the_definition(
            row in rows(),
            sampling in samplings(),
            draws in prop::collection::vec(0.0..1.0f64, 3),
        ) {
            for draw in [&draws[..], &[0.0, 1.0f64.next_down()]].concat() {
                let right = twin(&row, sampling, draw);
                for isa in Isa::available() {
                    prop_assert_eq!(sample(isa, &row, sampling, draw), Ok(right), "{}", isa.name());
                }
            }
        }
    }

    #[test]
    fn whole_and_key_are_what_they_say() {
        let mut last = 0;
        for exponent in 0..=40 {
            for w in [1u64 << exponent, (1 << exponent) | (1 << (exponent / 2))] {
                assert_eq!(whole(w as f32), w as f32 as u64);
            }
        }
        assert_eq!(whole(0.0), 0);
        for v in [f32::NEG_INFINITY, f32::MIN, -1.0, -1e-45, -0.0, 1e-45, 1.0, f32::INFINITY] {
            assert!(key(v) > last, "{v}");
            assert_eq!(from_key(key(v)), v);
            last = key(v);
        }
        assert_eq!(key(0.0), key(-0.0));
    }

    #[test]
    fn min_p_is_met_exactly() {
        for (min_p, least) in
            [(0.0, 0.0), (1.0, BEST), (1e-300, 1.0), (1.0 / 3.0, 366_503_885_000.0)]
        {
            let found = least_weight(min_p);
            assert!(f64::from(found) >= (min_p * f64::from(BEST)).ceil());
            assert!(
                found == 0.0 || f64::from(found.next_down()) < (min_p * f64::from(BEST)).ceil()
            );
            assert!((found - least).abs() <= least * f32::EPSILON, "{min_p}: {found}");
        }
    }

    #[test]
    fn extreme_temperatures_take_the_best_or_any() {
        let row = [-3e38, 3e38, 2.9e38, f32::NEG_INFINITY, 3e38];
        for (temperature, expected) in
            [(5e-324, [1, 1, 4]), (1.0, [1, 1, 4]), (1e300, [0, 1, 4]), (f64::MAX, [0, 1, 4])]
        {
            let sampling = Sampling { temperature, ..OFF };
            let drawn = [0.0, 0.3, 0.99].map(|draw| sample(Isa::GENERIC, &row, sampling, draw));
            assert_eq!(drawn, expected.map(Ok), "{temperature}");
        }
    }

    #[test]
    fn what_is_wrong_is_named() {
        let error = |row: &[f32], sampling, draw| {
            sample(Isa::GENERIC, row, sampling, draw).expect_err("wrong").to_string()
        };
        for bad in [f32::NAN, -f32::NAN, f32::INFINITY] {
            let mut row = vec![0.0; 3000];
            row[2500] = bad;
            assert!(error(&row, OFF, 0.5).contains("NaN or +inf"));
        }
        assert!(error(&[f32::NEG_INFINITY; 3], OFF, 0.5).contains("nothing above -inf"));
        assert!(error(&[], OFF, 0.5).contains("there are 0 logits"));
        for draw in [-0.1, 1.0, f64::NAN] {
            assert!(error(&[0.0], OFF, draw).starts_with("draw is"));
        }
        for temperature in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            let sampling = Sampling { temperature, ..OFF };
            assert!(error(&[0.0], sampling, 0.5).starts_with("temperature is"));
        }
        for wrong in [-0.1, 1.1, f64::NAN] {
            assert!(error(&[0.0], Sampling { top_p: wrong, ..OFF }, 0.5).starts_with("top_p is"));
            assert!(error(&[0.0], Sampling { min_p: wrong, ..OFF }, 0.5).starts_with("min_p is"));
        }
        assert!(error(&[0.0], Sampling { top_p: 0.0, ..OFF }, 0.5).starts_with("top_p is"));
    }
}
