//! An emulated GPU whose stream can be captured, as CUDA captures one into a graph: calls are kept instead of executed, and whatever
//! would break a real capture panics.

use super::emulated::Emulated;
use sae_kernels::Result;
use sae_kernels::cuda_driver::{Driver, Launch, Mainloop, PlainProduct, Tensor, TensorMap};
use std::sync::Mutex;

/// What a stream is given to do.
pub enum Enqueued {
    Launch(Box<Launch>),
    Product(PlainProduct),
}

pub struct Capturing {
    device: Emulated,
    captured: Mutex<Option<Vec<Enqueued>>>,
}

impl Capturing {
    pub fn new(device: Emulated) -> Self {
        Self { device, captured: Mutex::new(None) }
    }

    /// From here on calls are kept.
    pub fn begin(&self) {
        *self.captured.lock().unwrap() = Some(Vec::new());
    }

    /// The calls since [`begin`](Self::begin).
    pub fn end(&self) -> Vec<Enqueued> {
        self.captured.lock().unwrap().take().expect("a capture")
    }

    /// Executes what was kept.
    ///
    /// # Safety
    /// The memory that was in use at the capture still is.
    pub unsafe fn replay(&self, graph: &[Enqueued]) -> Result<()> {
        for call in graph {
            match call {
                // SAFETY: the caller's promise.
                Enqueued::Launch(launch) => unsafe { self.device.launch(launch) }?,
                // SAFETY: the caller's promise.
                Enqueued::Product(product) => assert!(unsafe { self.device.product(product) }?),
            }
        }
        Ok(())
    }

    fn must_not_capture(&self, call: &str) {
        // A second panic would hide the first.
        if !std::thread::panicking() {
            assert!(self.captured.lock().unwrap().is_none(), "{call} during a capture");
        }
    }

    /// Whether the call is kept rather than to be executed.
    fn keep(&self, call: Enqueued) -> bool {
        self.captured.lock().unwrap().as_mut().map(|captured| captured.push(call)).is_some()
    }
}

impl Driver for Capturing {
    fn alloc(&self, bytes: usize) -> Result<u64> {
        self.must_not_capture("an allocation");
        self.device.alloc(bytes)
    }
    unsafe fn free(&self, address: u64) {
        self.must_not_capture("a release of memory");
        // SAFETY: the caller's promise.
        unsafe { self.device.free(address) }
    }
    unsafe fn upload(&self, source: &[u8], target: u64) -> Result<()> {
        self.must_not_capture("an upload");
        // SAFETY: the caller's promise.
        unsafe { self.device.upload(source, target) }
    }
    unsafe fn download(&self, source: u64, target: &mut [u8]) -> Result<()> {
        self.must_not_capture("a download");
        // SAFETY: the caller's promise.
        unsafe { self.device.download(source, target) }
    }
    fn mainloop(&self) -> Mainloop {
        self.device.mainloop()
    }
    fn cooperative_blocks(&self) -> u32 {
        self.device.cooperative_blocks()
    }
    fn tensor_map(&self, tensor: &Tensor) -> Result<TensorMap> {
        self.device.tensor_map(tensor)
    }
    unsafe fn launch(&self, launch: &Launch) -> Result<()> {
        if self.keep(Enqueued::Launch(Box::new(*launch))) {
            return Ok(());
        }
        // SAFETY: the caller's promise.
        unsafe { self.device.launch(launch) }
    }
    fn product_workspace(&self) -> Option<usize> {
        self.device.product_workspace()
    }
    unsafe fn product(&self, product: &PlainProduct) -> Result<bool> {
        if self.device.product_workspace().is_some() && self.keep(Enqueued::Product(*product)) {
            return Ok(true);
        }
        // SAFETY: the caller's promise.
        unsafe { self.device.product(product) }
    }
    fn name(&self) -> String {
        self.device.name()
    }
}
