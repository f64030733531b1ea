//! What the test programs share.

/// Of the cases that a test ranges over, it takes one in this many: 1, or what
/// `BITNET_RS_TEST_ONE_IN` says where an emulated CPU is too slow for all.
/// Odd numbers do not fall in step with cases that come in pairs.
pub(crate) fn one_in() -> usize {
    match std::env::var("BITNET_RS_TEST_ONE_IN") {
        Ok(text) => text.parse().expect("BITNET_RS_TEST_ONE_IN is a number"),
        Err(_) => 1,
    }
}
