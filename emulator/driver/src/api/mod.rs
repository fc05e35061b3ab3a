//! The functions, by the chapters of the driver's manual.

mod absent;
mod context;
mod device;
mod execution;
mod graph;
mod memory;
mod module;
mod stream;
