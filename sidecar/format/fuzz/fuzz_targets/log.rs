#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| etcd_format::fuzzing::log(bytes));
