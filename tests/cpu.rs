//! Under an emulator, the tests of a level prove nothing if the emulated CPU
//! does not show that level: they would run on a lower one and pass. Who sets
//! up a CPU says what is to be found on it.

use bitnet_rs::cpu::Isa;

#[test]
fn the_highest_isa_is_the_expected_one() {
    if let Ok(expected) = std::env::var("BITNET_RS_TEST_HIGHEST_ISA") {
        let highest = Isa::available().pop().map(Isa::name);
        assert_eq!(highest, Some(expected.as_str()));
    }
}
