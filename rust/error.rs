//! The one error type of the core. It knows nothing of Python; `python.rs`
//! maps its three kinds to built-in exceptions.

use std::fmt;

/// Why the core refused to do something. Every variant carries a message that
/// names what was found and what was wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Error {
    /// A config field, a tensor, a token or an argument that does not fit.
    Invalid(String),
    /// A tensor that the architecture needs and the weights do not have.
    MissingTensor(String),
    /// Something that would have worked at another time or place: a cache in
    /// use, a process forked after the threads were started.
    State(String),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Invalid(message) | Error::State(message) => f.write_str(message),
            Error::MissingTensor(name) => write!(f, "tensor {name:?} is missing"),
        }
    }
}

impl std::error::Error for Error {}

/// Shorthand for [`Error::Invalid`] with a formatted message.
macro_rules! invalid {
    ($($arg:tt)*) => { $crate::error::Error::Invalid(format!($($arg)*)) };
}
pub(crate) use invalid;
