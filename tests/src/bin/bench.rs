//! Measures; see the README.

fn main() {}
