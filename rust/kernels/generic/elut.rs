//! ELUT, the element-wise look-up table of Bitnet.cpp (arXiv 2502.11880), for
//! any 2 to 8 integer levels. Here are the layout, the table and the scalar
//! kernel that defines the result; TL1 and TL2 are its two ternary instances.
//!
//! Columns are taken in groups of `g`. With `C` levels a group has `C^g`
//! patterns; their products with `g` activations are computed once for each
//! input, and every row then adds one table entry for `g` weights:
//!
//! ```text
//! table[k][e] = sum over j < g of level(e, j) * q[g * k + j]      for each input
//! y[r]        = sum over k of ±table[k][index(r, k)]              for each row
//! ```
//!
//! The byte shuffles of CPUs look 16 entries up, so an index has four bits.
//! A *plain* code numbers all patterns: `C^g <= 16`. A *mirror* code, for
//! levels that are symmetric about zero, has a sign bit apart from the index:
//! opposite patterns share an entry, and `ceil(C^g / 2) <= 16` are enough.
//!
//! # The layout
//!
//! Rows stand in the lanes of a register: [`ROWS`] of them make a row group, and
//! one shuffle looks up as many rows in the table of one column group. A byte
//! holds the indexes of two column groups of the same row. The mirrored part of
//! a row group is cut into blocks of eight column groups:
//!
//! ```text
//! groups 0 1 | groups 2 3 | groups 4 5 | groups 6 7 | signs      32 bytes each
//! ```
//!
//! with the sign of group `k` in bit `7 - k`. Columns that fill no block are
//! coded plainly (the papers' block-fitting), 32 bytes for two groups, as is
//! everything where the code has no mirror. The very last groups may reach past
//! the last column: activations are zero there, and so are the entries.
//!
//! # Two digits
//!
//! An entry does not fit a byte, so it is looked up as two. The papers take its
//! high and low bytes, and join them to int16 after each look-up. Here the two
//! bytes are digits of a base `B`, chosen so that both are small and signed:
//!
//! ```text
//! entry = B * high + low      three trits: B = 27, |low| <= 13, |high| <= 14
//! ```
//!
//! Then several look-ups (nine of three trits, eleven of two) add up in int8
//! lanes before they are joined and widened, and the sign of a mirrored pattern
//! is applied to each digit by itself. On AVX2 a plain look-up of 32 rows takes 4
//! operations and its share of 6 for joining, and not 6 as with bytes that are
//! joined at once; so these tables hold their own against `vpmaddubsw`.

use std::ops::Range;

use super::super::{Kernel, Layout, PackedMatrix, Prepared};
use crate::levels::Levels;

/// Interleaved rows: the bytes of a 256-bit register.
pub(in super::super) const ROWS: usize = 32;

/// Entries of a group's table: what one byte shuffle looks up.
pub(in super::super) const ENTRIES: usize = 16;

/// Bytes of a group's table: the low digits of all entries, then the high ones.
pub(in super::super) const TABLE_BYTES: usize = 2 * ENTRIES;

/// Column groups of a mirrored block: one bit each in a byte of signs.
pub(in super::super) const BLOCK_GROUPS: usize = 8;

/// Bytes of a mirrored block: half a byte for each index, a bit for each sign.
pub(in super::super) const BLOCK_BYTES: usize = ROWS * (BLOCK_GROUPS / 2 + 1);

/// Column groups that are packed together, a multiple of [`BLOCK_GROUPS`]: of
/// each row a few cache lines are read one after another, and the bytes of all
/// rows, side by side in their blocks, stay in L1 while they are written.
const TILE_GROUPS: usize = 128;

/// Columns of a group at most: five, two levels mirrored.
pub(in super::super) const MAX_GROUP: usize = 5;

/// How a group of columns is told by an index, and a sign if it is mirrored.
pub(in super::super) struct Code {
    /// Columns of a group.
    pub(in super::super) group: usize,
    /// `values[j][e]` is the level of column `j` in pattern `e`, 0 if the index
    /// is not in use.
    pub(in super::super) values: [[i8; ENTRIES]; MAX_GROUP],
    /// `digits[j][v]` is what column `j` adds to the number of a pattern, if its
    /// level has the bits `v`.
    digits: [[u8; 256]; MAX_GROUP],
    /// Index and [`NEGATIVE`] of each pattern.
    codes: [u8; PATTERNS],
}

/// Patterns at most: those of 16 entries, mirrored.
const PATTERNS: usize = 2 * ENTRIES;

/// The bit of a code that says that the entry is to be negated.
const NEGATIVE: u8 = 0x80;

impl Code {
    /// Patterns are numbers in base `C`, first column first, levels in rising
    /// order. So the opposite of pattern `p` is `C^g - 1 - p`, and three trits
    /// get the index and sign of the papers: `|9 a + 3 b + c|` and its sign.
    fn new(levels: Levels, group: usize, mirror: bool) -> Self {
        let values = levels.values();
        let base = values.len();
        let patterns = base.pow(group as u32);
        let half = if mirror { patterns / 2 } else { 0 };
        debug_assert!(patterns - half <= ENTRIES && group <= MAX_GROUP);
        debug_assert!(!mirror || levels.is_symmetric());
        let mut code = Self {
            group,
            values: [[0; ENTRIES]; MAX_GROUP],
            digits: [[0; 256]; MAX_GROUP],
            codes: [0; PATTERNS],
        };
        for pattern in half..patterns {
            let mut rest = pattern;
            for j in (0..group).rev() {
                code.values[j][pattern - half] = values[rest % base];
                rest /= base;
            }
        }
        for j in 0..group {
            let place = base.pow((group - 1 - j) as u32);
            for (rank, &v) in values.iter().enumerate() {
                code.digits[j][usize::from(v as u8)] = (rank * place) as u8;
            }
        }
        for pattern in 0..patterns {
            code.codes[pattern] = if pattern < half {
                // The opposite: with an odd number of patterns, one stands in the
                // middle and is its own.
                (patterns - 1 - pattern - half) as u8 | NEGATIVE
            } else {
                (pattern - half) as u8
            };
        }
        code
    }

    /// The code of each group of `values`. In a last group that is not full the
    /// columns that are missing have the lowest level.
    fn encode(&self, values: &[i8], codes: &mut [u8]) {
        match self.group {
            1 => self.encode_groups::<1>(values, codes),
            2 => self.encode_groups::<2>(values, codes),
            3 => self.encode_groups::<3>(values, codes),
            4 => self.encode_groups::<4>(values, codes),
            _ => self.encode_groups::<MAX_GROUP>(values, codes),
        }
    }

    fn encode_groups<const G: usize>(&self, values: &[i8], codes: &mut [u8]) {
        let (groups, rest) = values.as_chunks::<G>();
        for (code, group) in codes.iter_mut().zip(groups) {
            *code = self.code(group);
        }
        if !rest.is_empty() {
            codes[groups.len()] = self.code(rest);
        }
    }

    #[inline(always)]
    fn code(&self, group: &[i8]) -> u8 {
        let digits =
            group.iter().zip(&self.digits).map(|(&v, digits)| digits[usize::from(v as u8)]);
        self.codes[usize::from(digits.sum::<u8>()) % PATTERNS]
    }
}

/// The two digits of an entry, and how many may be added up before they have to
/// be widened. All bounds of the kernels are here.
#[derive(Clone, Copy, Debug)]
pub(in super::super) struct Digits {
    /// `B`, at most 128: kernels multiply by it as an unsigned byte.
    pub(in super::super) base: i16,
    /// `round(2^15 / B)`: `high = (entry * inverse + 2^14) >> 15`, which is what
    /// `vpmulhrsw` and `sqrdmulh` compute.
    pub(in super::super) inverse: i16,
    /// Look-ups whose digits add up to at most 127 in magnitude: int8 lanes hold
    /// them, and `B * high + low` of them fits int16.
    pub(in super::super) run: usize,
    /// The largest magnitude of an entry: `g * max_abs * 128`.
    reach: usize,
}

impl Digits {
    /// Takes the base with the longest run for entries up to `reach`.
    fn new(reach: usize) -> Self {
        let r = reach as i32;
        let candidates = (2..=128).map(|base: i32| {
            let inverse = ((1 << 15) + base / 2) / base;
            // entry - B * high = entry * (1 - B * inverse / 2^15) + B * f, where
            // |f| <= 1/2 comes from the rounding of `high`.
            let low = (r * ((1 << 15) - base * inverse).abs() + (base << 14)) >> 15;
            let high = (r * inverse + (1 << 14)) >> 15;
            let run = 127 / low.max(high).max(1) as usize;
            Self { base: base as i16, inverse: inverse as i16, run, reach }
        });
        // One level of magnitude 127: base 128, digits up to 64 and 127.
        candidates.rev().max_by_key(|digits| digits.run).expect("candidates were listed")
    }

    /// Look-ups whose entries add up to at most 32767 in magnitude: 85 of three
    /// trits, 127 of two. At least a pair if it is plain, because a single
    /// level is at most 127, and a block if it is mirrored ([`MAX_MIRRORED`]).
    pub(in super::super) fn int16_lookups(self) -> usize {
        i16::MAX as usize / self.reach
    }

    /// `[low, high]`.
    fn split(self, entry: i16) -> [i8; 2] {
        let high = (i32::from(entry) * i32::from(self.inverse) + (1 << 14)) >> 15;
        [(i32::from(entry) - i32::from(self.base) * high) as i8, high as i8]
    }

    /// The entries of a table.
    fn join(self, table: &[u8; TABLE_BYTES]) -> [i32; ENTRIES] {
        let (low, high) = table.split_at(ENTRIES);
        let digit = |byte: u8| i32::from(byte as i8);
        std::array::from_fn(|e| digit(low[e]) + i32::from(self.base) * digit(high[e]))
    }
}

/// How a matrix of a given width is cut up.
#[derive(Clone, Copy)]
pub(in super::super) struct Cut {
    /// Mirrored blocks, from column 0 on.
    pub(in super::super) blocks: usize,
    /// Pairs of plain groups after them, from this column on.
    pub(in super::super) pairs: usize,
    pub(in super::super) pairs_from: usize,
}

impl Cut {
    /// Column groups, mirrored ones first: the order of the tables.
    pub(in super::super) fn groups(self) -> usize {
        self.blocks * BLOCK_GROUPS + 2 * self.pairs
    }

    /// Bytes of the mirrored part of a row group.
    pub(in super::super) fn block_bytes(self) -> usize {
        self.blocks * BLOCK_BYTES
    }
}

/// The layout of one set of levels.
pub(in super::super) struct Elut {
    name: &'static str,
    levels: Levels,
    /// Of the blocks, if there are any.
    pub(in super::super) mirror: Option<Code>,
    /// Of what is left over, or of everything.
    pub(in super::super) plain: Code,
    pub(in super::super) digits: Digits,
}

/// A plain group has several columns only if `g * max_abs` is at most this:
/// then at least two look-ups add up in int8 ([`Digits::new`]), and four in
/// int16. Joining after every look-up would cost what larger groups save.
const MAX_PLAIN: usize = 63;

/// The same for a mirrored group: the eight of a block have to fit int16,
/// 8 * 31 * 128 = 31744.
const MAX_MIRRORED: usize = 31;

impl Elut {
    /// Takes the groups with the fewest bits a weight, plain ones where both are
    /// equal (two levels: four in a nibble or five in a nibble and a sign, one
    /// bit a weight in either case, and the sign costs time).
    ///
    /// | levels | group | bits a weight |
    /// |---|---|---|
    /// | 2 | plain 4 | 1 |
    /// | 3, symmetric | mirror 3 | 1.67 |
    /// | 3, 4 | plain 2 | 2 |
    /// | 5, symmetric | mirror 2 | 2.5 |
    /// | 5 to 8 | plain 1 | 4 |
    fn best(name: &'static str, levels: Levels) -> Self {
        let plain = Self::largest(levels, false);
        // A group of g takes 4 bits plain, 5 mirrored.
        let mirror = Some(Self::largest(levels, true))
            .filter(|&g| levels.is_symmetric() && 5 * plain < 4 * g);
        Self::new(name, levels, mirror, plain)
    }

    /// The most columns whose patterns an index can tell.
    fn largest(levels: Levels, mirror: bool) -> usize {
        let (values, max_abs) = (levels.values().len(), levels.max_abs() as usize);
        let (patterns, sum) =
            if mirror { (2 * ENTRIES, MAX_MIRRORED) } else { (ENTRIES, MAX_PLAIN) };
        (1..=MAX_GROUP)
            .rev()
            .find(|&g| values.pow(g as u32) <= patterns && g * max_abs <= sum)
            .unwrap_or(1)
    }

    /// Groups of given sizes: what is not mirrored is plain.
    pub(super) fn new(
        name: &'static str,
        levels: Levels,
        mirror: Option<usize>,
        plain: usize,
    ) -> Self {
        let reach = mirror.unwrap_or(0).max(plain) * levels.max_abs() as usize * 128;
        let digits = Digits::new(reach);
        // A block fits int16, or at least a pair of plain groups.
        let unit = if mirror.is_some() { BLOCK_GROUPS } else { 2 };
        debug_assert!(digits.int16_lookups() >= unit, "{name}");
        Self {
            name,
            levels,
            mirror: mirror.map(|group| Code::new(levels, group, true)),
            plain: Code::new(levels, plain, false),
            digits,
        }
    }

    pub(in super::super) fn cut(&self, cols: usize) -> Cut {
        let block = self.mirror.as_ref().map_or(usize::MAX, |code| code.group * BLOCK_GROUPS);
        let blocks = cols / block;
        let pairs_from = if blocks == 0 { 0 } else { blocks * block };
        Cut { blocks, pairs: (cols - pairs_from).div_ceil(2 * self.plain.group), pairs_from }
    }

    /// Gives `fill` the code, the activations and the room of each group's
    /// table, in the order of the groups.
    pub(in super::super) fn fill_table(
        &self,
        x: &mut Prepared,
        mut fill: impl FnMut(&Code, &[i8], &mut [[u8; TABLE_BYTES]]),
    ) {
        let cut = self.cut(x.cols);
        x.table_mut(self.name, cut.groups() * TABLE_BYTES);
        let (q, table) = (x.values.as_i8(), x.table.as_mut_slice().as_chunks_mut().0);
        let (mirrored, plain) = table.split_at_mut(cut.blocks * BLOCK_GROUPS);
        if let Some(code) = &self.mirror {
            fill(code, &q[..cut.pairs_from], mirrored);
        }
        // Past the last column stand zeros, more than a pair of groups needs.
        let cols = plain.len() * self.plain.group;
        fill(&self.plain, &q[cut.pairs_from..][..cols], plain);
    }

    /// The definition of the table.
    fn build_table(&self, x: &mut Prepared) {
        self.fill_table(x, |code, q, table| {
            for (q, table) in q.chunks_exact(code.group).zip(table) {
                for e in 0..ENTRIES {
                    // At most 32767 in magnitude by the choice of groups.
                    let entry: i16 = (q.iter().zip(&code.values))
                        .map(|(&q, values)| i16::from(q) * i16::from(values[e]))
                        .sum();
                    let [low, high] = self.digits.split(entry);
                    (table[e], table[ENTRIES + e]) = (low as u8, high as u8);
                }
            }
        });
    }
}

impl Layout for Elut {
    fn name(&self) -> &'static str {
        self.name
    }

    fn row_group(&self) -> usize {
        ROWS
    }

    fn group_bytes(&self, cols: usize) -> usize {
        let cut = self.cut(cols);
        cut.block_bytes() + cut.pairs * ROWS
    }

    fn levels(&self) -> Levels {
        self.levels
    }

    fn pack(&self, rows: &[i8], cols: usize, out: &mut [u8]) {
        let cut = self.cut(cols);
        let (blocks, pairs) = out.split_at_mut(cut.block_bytes());
        if let Some(code) = &self.mirror {
            let (blocks, _) = blocks.as_chunks_mut::<BLOCK_BYTES>();
            for (t, blocks) in blocks.chunks_mut(TILE_GROUPS / BLOCK_GROUPS).enumerate() {
                let start = t * TILE_GROUPS * code.group;
                let width = blocks.len() * BLOCK_GROUPS * code.group;
                let mut codes = [0; TILE_GROUPS];
                for (i, row) in rows.chunks_exact(cols).enumerate() {
                    code.encode(&row[start..][..width], &mut codes);
                    let (codes, _) = codes.as_chunks::<BLOCK_GROUPS>();
                    for (block, codes) in blocks.iter_mut().zip(codes) {
                        let mut signs = 0;
                        for (p, pair) in codes.as_chunks::<2>().0.iter().enumerate() {
                            let indexes = pair.map(|code| code & !NEGATIVE);
                            block[p * ROWS + i] = indexes[0] | indexes[1] << 4;
                            signs = signs << 2 | pair[0] >> 7 << 1 | pair[1] >> 7;
                        }
                        block[BLOCK_GROUPS / 2 * ROWS + i] = signs;
                    }
                }
            }
        }
        let (pairs, _) = pairs.as_chunks_mut::<ROWS>();
        for (t, pairs) in pairs.chunks_mut(TILE_GROUPS / 2).enumerate() {
            let start = cut.pairs_from + t * TILE_GROUPS * self.plain.group;
            let width = (2 * pairs.len() * self.plain.group).min(cols - start);
            // Zeros where a last pair lacks its second group.
            let mut codes = [0; TILE_GROUPS];
            for (i, row) in rows.chunks_exact(cols).enumerate() {
                self.plain.encode(&row[start..][..width], &mut codes);
                for (out, pair) in pairs.iter_mut().zip(codes.as_chunks::<2>().0) {
                    out[i] = pair[0] | pair[1] << 4;
                }
            }
        }
    }

    fn unpack(&self, group: &[u8], cols: usize, out: &mut [i8]) {
        let cut = self.cut(cols);
        let (blocks, pairs) = group.split_at(cut.block_bytes());
        for (i, row) in out.chunks_exact_mut(cols).enumerate() {
            let (mirrored, plain) = row.split_at_mut(cut.pairs_from);
            if let Some(code) = &self.mirror {
                for (k, cols) in mirrored.chunks_exact_mut(code.group).enumerate() {
                    let block = &blocks[k / BLOCK_GROUPS * BLOCK_BYTES..][..BLOCK_BYTES];
                    let (e, negative) = mirrored_index(block, k % BLOCK_GROUPS, i);
                    for (v, values) in cols.iter_mut().zip(&code.values) {
                        *v = if negative { -values[e] } else { values[e] };
                    }
                }
            }
            for (k, cols) in plain.chunks_mut(self.plain.group).enumerate() {
                let e = plain_index(pairs, k, i);
                for (v, values) in cols.iter_mut().zip(&self.plain.values) {
                    *v = values[e];
                }
            }
        }
    }
}

/// The index of row `i` in plain group `k`.
fn plain_index(pairs: &[u8], k: usize, i: usize) -> usize {
    usize::from(pairs[k / 2 * ROWS + i] >> (k % 2 * 4) & 15)
}

/// The same for group `k` of a mirrored block, and whether to negate.
fn mirrored_index(block: &[u8], k: usize, i: usize) -> (usize, bool) {
    (plain_index(block, k, i), block[BLOCK_GROUPS / 2 * ROWS + i] >> (7 - k) & 1 == 1)
}

/// A new layout for a set of levels, never freed, like every layout:
/// `available_for` asks once for each set.
pub(in super::super) fn layout(levels: Levels) -> &'static Elut {
    let values: Vec<_> = levels.values().iter().map(i8::to_string).collect();
    let name = Box::leak(format!("elut({})", values.join(",")).into_boxed_str());
    Box::leak(Box::new(Elut::best(name, levels)))
}

/// The definition.
pub(in super::super) struct GenericElut {
    name: &'static str,
    layout: &'static Elut,
}

impl GenericElut {
    pub(in super::super) fn new(name: &'static str, layout: &'static Elut) -> Self {
        Self { name, layout }
    }
}

impl Kernel for GenericElut {
    fn name(&self) -> &'static str {
        self.name
    }

    fn layout(&self) -> &'static dyn Layout {
        self.layout
    }

    fn table(&self) -> &'static str {
        self.layout.name
    }

    fn build_table(&self, x: &mut Prepared) {
        self.layout.build_table(x);
    }

    fn gemv(&self, w: &PackedMatrix, rows: Range<usize>, x: &Prepared, y: &mut [f32]) {
        let (cut, digits) = (self.layout.cut(w.cols), self.layout.digits);
        let (tables, _) = x.table().as_chunks::<TABLE_BYTES>();
        let (mirrored, plain) = tables.split_at(cut.blocks * BLOCK_GROUPS);
        for (y, first) in y.chunks_mut(ROWS).zip(rows.step_by(ROWS)) {
            let (blocks, pairs) = w.group(first).split_at(cut.block_bytes());
            let (blocks, _) = blocks.as_chunks::<BLOCK_BYTES>();
            let mut acc = [0; ROWS];
            for (k, table) in mirrored.iter().enumerate() {
                let entries = digits.join(table);
                let (block, k) = (&blocks[k / BLOCK_GROUPS], k % BLOCK_GROUPS);
                for i in 0..ROWS {
                    let (e, negative) = mirrored_index(block, k, i);
                    acc[i] += if negative { -entries[e] } else { entries[e] };
                }
            }
            for (k, table) in plain.iter().enumerate() {
                let entries = digits.join(table);
                for i in 0..ROWS {
                    acc[i] += entries[plain_index(pairs, k, i)];
                }
            }
            for (y, acc) in y.iter_mut().zip(acc) {
                *y = x.rescale(acc, w.scale);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{tl1, tl2};
    use super::*;

    fn levels(values: &[i8]) -> Levels {
        Levels::new(values).unwrap()
    }

    fn best(values: &[i8]) -> Elut {
        Elut::best("test", levels(values))
    }

    /// Sets of levels of all kinds of reach.
    fn sets() -> Vec<Levels> {
        let mut sets = vec![levels(&[0, 1]), levels(&[-127, -1, 0, 127]), Levels::TERNARY];
        for a in 1..=127 {
            sets.extend([&[-a, a][..], &[-a, 0, a], &[a - 1, a]].map(levels));
            if a > 1 {
                sets.push(levels(&[-a, -1, 0, 1, a]));
            }
            if a > 5 {
                sets.push(levels(&[-a, -4, -2, 0, 1, 3, 5, a]));
            }
        }
        sets
    }

    #[test]
    fn takes_the_fewest_bits_a_weight() {
        let groups = |values: &[i8]| {
            let e = best(values);
            (e.mirror.map(|code| code.group), e.plain.group)
        };
        assert_eq!(groups(&[-1, 1]), (None, 4));
        assert_eq!(groups(&[0, 1]), (None, 4));
        assert_eq!(groups(&[-3, 0, 3]), (Some(3), 2));
        assert_eq!(groups(&[0, 1, 2]), (None, 2));
        assert_eq!(groups(&[-3, -1, 1, 3]), (None, 2));
        assert_eq!(groups(&[-2, -1, 0, 1, 2]), (Some(2), 1));
        assert_eq!(groups(&[-2, -1, 0, 1, 3]), (None, 1));
        assert_eq!(groups(&[-7, -5, -3, -1, 1, 3, 5, 7]), (None, 1));
        // Large levels: sums of several would leave int8 or int16 too soon.
        assert_eq!(groups(&[-10, 0, 10]), (Some(3), 2));
        assert_eq!(groups(&[-11, 0, 11]), (None, 2));
        assert_eq!(groups(&[-100, 100]), (None, 1));
        // Two bits a weight; 1.67 for all but the 16 of 2560 that fill no block.
        assert_eq!(tl1::layout().group_bytes(2560), ROWS * 640);
        assert_eq!(tl2::layout().group_bytes(2560), ROWS * (2544 / 24 * 5 + 4));
    }

    /// Every digit of every possible entry, and what kernels rely on.
    #[test]
    fn digits_stay_in_their_bounds() {
        for set in sets() {
            let e = Elut::best("test", set);
            let d = e.digits;
            let reach = d.reach as i16;
            let mut largest = 0;
            for entry in -reach..=reach {
                let [low, high] = d.split(entry);
                let joined = i32::from(low) + i32::from(d.base) * i32::from(high);
                assert_eq!(joined, i32::from(entry));
                largest = largest.max(low.unsigned_abs()).max(high.unsigned_abs());
            }
            assert!(usize::from(largest) * d.run <= 127, "{set:?} {d:?} {largest}");
            assert!((1..=128).contains(&d.base) && d.int16_lookups() >= 2, "{set:?} {d:?}");
            if e.mirror.is_some() {
                assert!(d.run >= 2 && d.int16_lookups() >= BLOCK_GROUPS, "{set:?} {d:?}");
            }
            if e.plain.group > 1 {
                assert!(d.run >= 2, "{set:?} {d:?}");
            }
        }
        assert_eq!((tl1::layout().digits.run, tl1::layout().digits.int16_lookups()), (11, 127));
        assert_eq!((tl2::layout().digits.run, tl2::layout().digits.int16_lookups()), (9, 85));
    }

    /// The numbers that the papers give to patterns, and the opposites of all.
    #[test]
    fn codes_are_those_of_the_papers() {
        let encode = |code: &Code, trits: &[i8]| {
            let mut codes = [0];
            code.encode(trits, &mut codes);
            (codes[0] & !NEGATIVE, codes[0] & NEGATIVE != 0)
        };
        let two = Code::new(Levels::TERNARY, 2, false);
        let three = Code::new(Levels::TERNARY, 3, true);
        for pattern in 0..27 {
            let trits = [pattern / 9 - 1, pattern / 3 % 3 - 1, pattern % 3 - 1];
            let number = 9 * trits[0] + 3 * trits[1] + trits[2];
            let (index, negative) = encode(&three, &trits);
            assert_eq!((index, negative), (number.unsigned_abs(), number < 0), "{trits:?}");
            let (index, _) = encode(&two, &trits[1..]);
            assert_eq!(index as i8, 3 * trits[1] + trits[2] + 4, "{trits:?}");
        }
    }

    /// Mirror codes that are not the best of any levels are right all the same.
    #[test]
    fn packs_any_groups() {
        for (values, mirror, plain) in
            [(&[-1, 1][..], Some(5), 4), (&[-3, -1, 1, 3], Some(2), 2), (&[-1, 0, 1], Some(1), 1)]
        {
            let e = Elut::new("test", levels(values), mirror, plain);
            let cols = 97;
            let weights: Vec<i8> =
                (0..3 * cols).map(|i| values[i * i % 31 % values.len()]).collect();
            let mut bytes = vec![0; e.group_bytes(cols)];
            e.pack(&weights, cols, &mut bytes);
            let mut out = vec![0; ROWS * cols];
            e.unpack(&bytes, cols, &mut out);
            assert!(out[..3 * cols] == weights, "{values:?} {mirror:?}");
        }
    }

    /// Whatever bytes there are, they can be read.
    #[test]
    fn unpacks_any_bytes() {
        for set in [levels(&[-1, 1]), levels(&[-2, -1, 0, 1, 2]), levels(&[0, 5])] {
            let e = Elut::best("test", set);
            let bytes: Vec<u8> = (0..e.group_bytes(133)).map(|i| (i * 73) as u8).collect();
            e.unpack(&bytes, 133, &mut vec![0; ROWS * 133]);
        }
    }
}
