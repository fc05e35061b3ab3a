//! The sums, with a library in NCCL's place and the host's memory in a GPU's.

#[path = "../examples/fake_nccl.rs"]
mod fake_nccl;

use fake_nccl::Communicator;
use sae_kernels::cuda_driver::{Driver, Launch, Mainloop, Tensor, TensorMap};
use sae_kernels::{Backend, Cuda, CudaMemory, Error as KernelError, Memory, Result as KernelResult, Statistics};
use sae_kernels_nccl::{Error, Nccl, Ranks};
use std::cell::Cell;
use std::collections::HashMap;
use std::path::Path;
use std::ptr;
use std::slice;
use std::sync::{Arc, Mutex};

/// A device whose memory is the host's, and which has no kernels.
#[derive(Default)]
struct HostMemory(Mutex<HashMap<u64, Box<[u64]>>>);

impl Driver for HostMemory {
    fn alloc(&self, bytes: usize) -> KernelResult<u64> {
        let mut memory = vec![0u64; bytes.div_ceil(8)].into_boxed_slice();
        let address = memory.as_mut_ptr() as u64;
        self.0.lock().unwrap().insert(address, memory);
        Ok(address)
    }
    unsafe fn free(&self, address: u64) {
        self.0.lock().unwrap().remove(&address).expect("memory of this device");
    }
    unsafe fn upload(&self, source: &[u8], target: u64) -> KernelResult<()> {
        // SAFETY: the caller's promise.
        unsafe { slice::from_raw_parts_mut(target as *mut u8, source.len()) }.copy_from_slice(source);
        Ok(())
    }
    unsafe fn download(&self, source: u64, target: &mut [u8]) -> KernelResult<()> {
        // SAFETY: the caller's promise.
        target.copy_from_slice(unsafe { slice::from_raw_parts(source as *const u8, target.len()) });
        Ok(())
    }
    fn mainloop(&self) -> Mainloop {
        Mainloop::Sm80
    }
    fn tensor_map(&self, _: &Tensor) -> KernelResult<TensorMap> {
        unimplemented!("no kernels, so no tensors")
    }
    unsafe fn launch(&self, _: &Launch) -> KernelResult<()> {
        Err(KernelError::Device { call: "launching", reason: "sums launch no kernels of ours".into() })
    }
    fn name(&self) -> String {
        "the host's memory".into()
    }
}

fn cuda() -> Cuda {
    Cuda::on_driver(Arc::new(HostMemory::default()))
}

/// The example, which `cargo test` builds beside the tests.
fn fake() -> Nccl {
    let tests = std::env::current_exe().unwrap();
    let path = tests.parent().and_then(Path::parent).unwrap().join("examples/libfake_nccl.so");
    assert!(path.exists(), "{} is built by `cargo test -p sae-kernels-nccl` without --test", path.display());
    Nccl::open(path.to_str().unwrap()).unwrap()
}

/// A cell, as the library changes it behind our back.
fn communicator() -> Cell<Communicator> {
    Cell::new(Communicator { size: 3, rank: 2, ..Communicator::default() })
}

fn ranks(communicator: &Cell<Communicator>) -> Result<Ranks<f32>, Error> {
    // SAFETY: the library's own communicator, which the test keeps.
    unsafe { Ranks::new(fake(), communicator.as_ptr().cast(), cuda()) }
}

#[test]
fn gradients_are_summed_where_they_are() {
    let communicator = communicator();
    let ranks = ranks(&communicator).unwrap();
    assert_eq!((ranks.rank(), ranks.size()), (2, 3));
    let cuda = cuda();
    let mut gradients = cuda.alloc::<f32>(7).unwrap();
    cuda.upload(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0], CudaMemory::slice_mut(&mut gradients)).unwrap();
    let part = CudaMemory::part_mut(CudaMemory::slice_mut(&mut gradients), 2..6);
    let address = part.address();
    ranks.sum(part).unwrap();
    let mut found = [0.0; 7];
    cuda.download(CudaMemory::slice(&gradients), &mut found).unwrap();
    assert_eq!(found, [1.0, 2.0, 9.0, 12.0, 15.0, 18.0, 7.0]);
    // ncclFloat32, ncclSum.
    let expected = Communicator {
        sent: address,
        received: address,
        len: 4,
        data_type: 7,
        operation: 0,
        calls: 1,
        ..communicator.get()
    };
    assert_eq!(communicator.get(), expected);
    // Nothing to sum.
    ranks.sum(CudaMemory::part_mut(CudaMemory::slice_mut(&mut gradients), 3..3)).unwrap();
    assert_eq!(communicator.get().calls, 1);
}

#[test]
fn statistics_are_those_of_all_ranks() {
    let communicator = communicator();
    let ranks = ranks(&communicator).unwrap();
    let (mut statistics, mut expected) = (Statistics::new(5, true), Statistics::new(5, true));
    for rows in 0..4 {
        let a: Vec<f64> = (0..5).map(|j| f64::from(3 * rows + j)).collect();
        statistics.add_row(0.5, &a);
        (0..3).for_each(|_| expected.add_row(0.5, &a));
    }
    let cuda = cuda();
    let len = Statistics::len(5, true);
    let mut packed = cuda.alloc::<f64>(len).unwrap();
    cuda.upload(statistics.sums(), CudaMemory::slice_mut(&mut packed)).unwrap();
    ranks.sum(CudaMemory::slice_mut(&mut packed)).unwrap();
    cuda.download(CudaMemory::slice(&packed), statistics.sums_mut()).unwrap();
    // Small integers, so exact.
    assert_eq!(statistics, expected);
    // ncclFloat64, ncclSum.
    let found = communicator.get();
    assert_eq!((found.len, found.data_type, found.operation, found.sent), (len, 8, 0, found.received));
}

#[test]
fn no_communicator_is_refused() {
    // SAFETY: NULL is allowed.
    let null = unsafe { Ranks::new(fake(), ptr::null_mut(), cuda()) };
    assert_eq!(null.err(), Some(Error::NullCommunicator));
}

#[test]
fn errors_of_the_library_come_back() {
    let invalid = |call| Error::Nccl { call, code: 5, reason: "invalid usage".into() };
    let asked = Cell::new(Communicator { answers: 5, ..communicator().get() });
    assert_eq!(ranks(&asked).err(), Some(invalid("ncclCommUserRank")));
    let summed = communicator();
    let ranks = ranks(&summed).unwrap();
    for (result, error) in [(5, invalid("ncclAllReduce")), (7, Error::InProgress { call: "ncclAllReduce" })] {
        summed.set(Communicator { result, ..summed.get() });
        let cuda = cuda();
        let mut gradients = cuda.alloc::<f32>(1).unwrap();
        assert_eq!(ranks.sum(CudaMemory::slice_mut(&mut gradients)), Err(error));
    }
}

#[test]
fn without_the_library_the_error_names_the_fix() {
    let missing = Nccl::open("/nowhere/libnccl.so.2").unwrap_err();
    assert!(matches!(&missing, Error::NoLibrary { library, .. } if library == "/nowhere/libnccl.so.2"), "{missing:?}");
    assert!(missing.to_string().contains("LD_LIBRARY_PATH"), "{missing}");
    let other = Nccl::open("libm.so.6").unwrap_err();
    assert_eq!(other, Error::NoSymbol { library: "libm.so.6".into(), symbol: "ncclGetErrorString" });
    // This machine may have it.
    match Nccl::load() {
        Ok(_) | Err(Error::NoLibrary { .. }) => {}
        Err(error) => panic!("{error}"),
    }
}
