//! Devices that keep accounts of their memory.

use sae_kernels::Result;
use sae_kernels::cuda_driver::{Driver, Launch, Mainloop, PlainProduct, Tensor, TensorMap};
use std::collections::HashMap;
use std::sync::Mutex;

/// A device with accounts of what is allocated on it.
pub struct Accounts<D> {
    pub device: D,
    book: Mutex<Book>,
}

#[derive(Default)]
struct Book {
    live: HashMap<u64, usize>,
    balance: Balance,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Balance {
    /// Bytes in use.
    pub bytes: usize,
    /// The most that ever were.
    pub peak: usize,
    pub allocations: usize,
}

impl<D> Accounts<D> {
    pub fn new(device: D) -> Self {
        Self { device, book: Mutex::default() }
    }
    pub fn balance(&self) -> Balance {
        self.book.lock().unwrap().balance
    }
}

impl<D: Driver> Driver for Accounts<D> {
    fn alloc(&self, bytes: usize) -> Result<u64> {
        let address = self.device.alloc(bytes)?;
        let Book { live, balance } = &mut *self.book.lock().unwrap();
        assert_eq!(live.insert(address, bytes), None, "{address:#x} is in use");
        balance.bytes += bytes;
        balance.peak = balance.peak.max(balance.bytes);
        balance.allocations += 1;
        Ok(address)
    }
    unsafe fn free(&self, address: u64) {
        // A poisoned lock means that a test has failed already.
        if let Ok(mut book) = self.book.lock() {
            book.balance.bytes -= book.live.remove(&address).expect("a live allocation");
        }
        // SAFETY: the caller's promise.
        unsafe { self.device.free(address) }
    }
    unsafe fn upload(&self, source: &[u8], target: u64) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.device.upload(source, target) }
    }
    unsafe fn download(&self, source: u64, target: &mut [u8]) -> Result<()> {
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
        // SAFETY: the caller's promise.
        unsafe { self.device.launch(launch) }
    }
    fn product_workspace(&self) -> Option<usize> {
        self.device.product_workspace()
    }
    unsafe fn product(&self, product: &PlainProduct) -> Result<bool> {
        // SAFETY: the caller's promise.
        unsafe { self.device.product(product) }
    }
    fn name(&self) -> String {
        self.device.name()
    }
}

/// A device of addresses alone, which hold nothing and where nothing is computed: what the host's code allocates does not depend on it, and
/// shapes may be as large as they are on a GPU.
pub struct Nowhere {
    next: Mutex<u64>,
    mainloop: Mainloop,
    library: Option<usize>,
    cooperative_blocks: u32,
}

impl Nowhere {
    /// `library`: bytes of scratch that a library of products takes, if there is one.
    pub fn new(mainloop: Mainloop, library: Option<usize>) -> Self {
        Self { next: Mutex::new(1 << 20), mainloop, library, cooperative_blocks: 0 }
    }

    /// With cooperative launches.
    pub fn cooperative(self) -> Self {
        Self { cooperative_blocks: 264, ..self }
    }
}

impl Driver for Nowhere {
    fn alloc(&self, bytes: usize) -> Result<u64> {
        let mut next = self.next.lock().unwrap();
        let address = *next;
        *next += (bytes as u64).next_multiple_of(256);
        Ok(address)
    }
    unsafe fn free(&self, _: u64) {}
    unsafe fn upload(&self, _: &[u8], _: u64) -> Result<()> {
        Ok(())
    }
    unsafe fn download(&self, _: u64, target: &mut [u8]) -> Result<()> {
        target.fill(0);
        Ok(())
    }
    fn mainloop(&self) -> Mainloop {
        self.mainloop
    }
    fn cooperative_blocks(&self) -> u32 {
        self.cooperative_blocks
    }
    fn tensor_map(&self, _: &Tensor) -> Result<TensorMap> {
        Ok([0; 16])
    }
    unsafe fn launch(&self, _: &Launch) -> Result<()> {
        Ok(())
    }
    fn product_workspace(&self) -> Option<usize> {
        self.library
    }
    unsafe fn product(&self, _: &PlainProduct) -> Result<bool> {
        Ok(self.library.is_some())
    }
    fn name(&self) -> String {
        "nowhere".into()
    }
}
