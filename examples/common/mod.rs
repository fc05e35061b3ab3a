//! What the examples share. One idea a file.

// Each example and each test uses only a part of this.
#![allow(dead_code)]

pub mod checkpoint;
pub mod data;
pub mod device;
pub mod evaluate;
pub mod figures;
pub mod files;
pub mod lbfgs;
pub mod matmul;
pub mod metrics;
pub mod probe;
pub mod trainer;
