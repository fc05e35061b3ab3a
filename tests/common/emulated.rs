//! An emulated GPU behind the CUDA backend's device trait: it executes the PTX that the build left, checks every access, and panics at
//! the first broken rule.

use super::staged::Staged;
use super::{Under, Where};
use ptx_emulator::{
    Argument, Asynchronous, Device, Fault, Grid, LaunchStats, Module, Options, Rounding, Swizzle, TensorElement,
};
use sae_kernels::cuda_driver::{
    Driver, FAMILIES, Launch, Mainloop, PTX_DIR, PlainProduct, Schedule, Storage, Tensor, TensorMap,
};
use sae_kernels::operations::Layout;
use sae_kernels::{Cuda, CudaElement, Element, bf16, f16};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock};

/// The PTX of a family with this mainloop, as the build left it; families without products have one for all.
pub fn ptx(family: &str, mainloop: Mainloop) -> String {
    // Where the build left it, unless the program was carried elsewhere.
    let folder =
        std::env::var("SAE_KERNELS_PTX_DIR").unwrap_or_else(|_| PTX_DIR.expect("the build left PTX").to_owned());
    let sm90 = format!("{folder}/{family}_sm90.ptx");
    let is_sm90 = mainloop != Mainloop::Sm80 && std::path::Path::new(&sm90).exists();
    std::fs::read_to_string(if is_sm90 { sm90 } else { format!("{folder}/{family}.ptx") }).unwrap()
}

/// Every kernel, by its name.
fn modules(mainloop: Mainloop) -> &'static HashMap<&'static str, Arc<Module>> {
    static MODULES: [OnceLock<HashMap<&'static str, Arc<Module>>>; 2] = [OnceLock::new(), OnceLock::new()];
    MODULES[usize::from(mainloop != Mainloop::Sm80)].get_or_init(|| {
        let mut modules = HashMap::new();
        for (family, kernels) in FAMILIES {
            let text = ptx(family, mainloop);
            let module = Arc::new(Module::parse(&text).unwrap_or_else(|error| panic!("{family}.ptx: {error}")));
            let mut expected = kernels.to_vec();
            expected.sort_unstable();
            assert_eq!(module.kernels(), expected, "kernels of {family}.cu");
            modules.extend(kernels.iter().map(|kernel| (*kernel, module.clone())));
        }
        modules
    })
}

/// An emulated GPU.
pub struct Emulated {
    device: Mutex<Device>,
    library: Option<Library>,
    mainloop: Mainloop,
    cooperative_blocks: u32,
}

/// Answers plain products as cuBLASLt would: sums of f64, rounded once.
struct Library {
    takes: fn(&PlainProduct) -> bool,
    asked: Mutex<Vec<PlainProduct>>,
}

/// Scratch of the library.
const LIBRARY_BYTES: usize = 1000;

impl Emulated {
    pub fn new(options: Options) -> Self {
        // What the smallest of the GPUs has.
        let device = Device::new(Options { shared_limit: 99 << 10, ..options });
        Self { device: Mutex::new(device), library: None, mainloop: Mainloop::Sm80, cooperative_blocks: 0 }
    }

    /// Of compute capability 9.0, with one cluster's multiprocessors: it goes through all squares of a product.
    pub fn sm90(options: Options, schedule: Schedule) -> Self {
        Self::with_multiprocessors(options, 2, Some(schedule))
    }

    /// Of compute capability 9.0.
    pub fn with_multiprocessors(options: Options, multiprocessors: u32, schedule: Option<Schedule>) -> Self {
        let device = Device::new(Options { shared_limit: 227 << 10, ..options });
        let mainloop = Mainloop::Sm90 { multiprocessors, schedule };
        Self { device: Mutex::new(device), library: None, mainloop, cooperative_blocks: 0 }
    }

    /// With cooperative launches of at most so many blocks: small steps are one launch. Without, they are made of the other kernels.
    pub fn cooperative(self, blocks: u32) -> Self {
        Self { cooperative_blocks: blocks, ..self }
    }

    /// With a library that computes those plain products that it `takes`.
    pub fn with_library(options: Options, takes: fn(&PlainProduct) -> bool) -> Self {
        Self { library: Some(Library { takes, asked: Mutex::default() }), ..Self::new(options) }
    }

    /// The products that the library was asked for since the last call.
    pub fn asked(&self) -> Vec<PlainProduct> {
        self.library.as_ref().map_or_else(Vec::new, |library| std::mem::take(&mut library.asked.lock().unwrap()))
    }

    /// The device as it stands now.
    pub fn snapshot(&self) -> Device {
        self.device.lock().unwrap().clone()
    }

    /// Runs a kernel, and panics at the first broken rule.
    pub fn run(&self, launch: &Launch) -> LaunchStats {
        let result = launch_on(&mut self.device.lock().unwrap(), &modules(self.mainloop)[launch.kernel], launch);
        result.unwrap_or_else(|fault| panic!("{fault}"))
    }
}

fn widened(storage: Storage, bytes: &[u8]) -> Vec<f64> {
    let bits = bytes.chunks_exact(2).map(|two| u16::from_le_bytes([two[0], two[1]]));
    match storage {
        Storage::Bf16 => bits.map(|bits| bf16::from_bits(bits).to_f64()).collect(),
        Storage::F16 => bits.map(|bits| f16::from_bits(bits).to_f64()).collect(),
    }
}

/// The product, row by row, so that what lies between rows is neither read nor written.
fn multiply(device: &mut Device, product: &PlainProduct) {
    let [m, n, k] = product.extents;
    let mut read = |place: sae_kernels::cuda_driver::Place, [rows, cols]: [usize; 2]| -> Vec<Vec<f64>> {
        assert!(place.row_stride >= cols, "{product:?}");
        (0..rows)
            .map(|row| device.read(place.address + (row * place.row_stride * 2) as u64, cols * 2).unwrap())
            .map(|bytes| widened(product.storage, &bytes))
            .collect()
    };
    let [left_shape, right_shape, _] = product.shapes();
    let (left, right) = (read(product.left, left_shape), read(product.right, right_shape));
    let left_at = |i: usize, l: usize| if product.layout == Layout::Tn { left[l][i] } else { left[i][l] };
    let right_at = |l: usize, j: usize| if product.layout == Layout::Nt { right[j][l] } else { right[l][j] };
    for i in 0..m {
        let address = product.out.address + (i * product.out.row_stride * 4) as u64;
        let before = product.accumulate.then(|| device.read(address, n * 4).unwrap());
        let mut row = Vec::with_capacity(n * 4);
        for j in 0..n {
            let before = before
                .as_ref()
                .map_or(0.0, |row| f64::from(f32::from_le_bytes(row[4 * j..4 * j + 4].try_into().unwrap())));
            let sum: f64 = (0..k).map(|l| left_at(i, l) * right_at(l, j)).sum();
            row.extend(((before + sum) as f32).to_le_bytes());
        }
        device.write(address, &row).unwrap();
    }
}

/// Launches a kernel of a module as the backend would.
pub fn launch_on(device: &mut Device, module: &Module, launch: &Launch) -> Result<LaunchStats, Fault> {
    let grid = Grid {
        grid: [launch.grid[0], launch.grid[1], 1],
        block: [launch.threads, 1, 1],
        shared_bytes: launch.shared_bytes,
        cooperative: launch.cooperative,
        cluster: [launch.cluster, 1, 1],
    };
    device.launch(module, launch.kernel, grid, &[Argument::bytes(launch.argument.bytes())])
}

type Outcome<T> = sae_kernels::Result<T>;

impl Driver for Emulated {
    fn alloc(&self, bytes: usize) -> Outcome<u64> {
        let mut device = self.device.lock().unwrap();
        let address = device.alloc(bytes);
        device.write(address, &vec![0; bytes]).unwrap();
        Ok(address)
    }
    unsafe fn free(&self, address: u64) {
        // A poisoned lock means that a test has failed already.
        if let Ok(mut device) = self.device.lock() {
            assert!(device.free(address), "{address:#x} is not a live allocation");
        }
    }
    unsafe fn upload(&self, source: &[u8], target: u64) -> Outcome<()> {
        self.device.lock().unwrap().write(target, source).unwrap();
        Ok(())
    }
    unsafe fn download(&self, source: u64, target: &mut [u8]) -> Outcome<()> {
        target.copy_from_slice(&self.device.lock().unwrap().read(source, target.len()).unwrap());
        Ok(())
    }
    fn mainloop(&self) -> Mainloop {
        self.mainloop
    }
    fn cooperative_blocks(&self) -> u32 {
        self.cooperative_blocks
    }
    fn tensor_map(&self, tensor: &Tensor) -> Outcome<TensorMap> {
        let Tensor { address, extents, strides } = tensor;
        let shape = [Tensor::BOX, Tensor::BOX, 1];
        let map = ptx_emulator::TensorMap::new(TensorElement::Bf16, *address, extents, strides, &shape);
        let bytes = map.swizzle(Swizzle::B128).to_bytes().unwrap_or_else(|error| panic!("{tensor:?}: {error}"));
        Ok(std::array::from_fn(|i| u64::from_le_bytes(bytes[8 * i..8 * i + 8].try_into().unwrap())))
    }
    unsafe fn launch(&self, launch: &Launch) -> Outcome<()> {
        self.run(launch);
        Ok(())
    }
    fn product_workspace(&self) -> Option<usize> {
        self.library.as_ref().map(|_| LIBRARY_BYTES)
    }
    unsafe fn product(&self, product: &PlainProduct) -> Outcome<bool> {
        let Some(library) = &self.library else { return Ok(false) };
        assert!(product.extents.iter().all(|extent| *extent > 0), "{product:?}");
        assert!(product.workspace.is_multiple_of(256), "{product:?}");
        library.asked.lock().unwrap().push(*product);
        if !(library.takes)(product) {
            return Ok(false);
        }
        let mut device = self.device.lock().unwrap();
        // All of its scratch is its own.
        device.write(product.workspace, &[0xa5; LIBRARY_BYTES]).unwrap();
        multiply(&mut device, product);
        Ok(true)
    }
    fn name(&self) -> String {
        if self.mainloop == Mainloop::Sm80 { "an emulated GPU".into() } else { "an emulated GPU of 9.0".into() }
    }
}

/// The CUDA backend on an emulated GPU of compute capability 9.0.
pub fn cuda_sm90<E: CudaElement>(options: Options, schedule: Schedule) -> Cuda<E> {
    Cuda::on_driver(Arc::new(Emulated::sm90(options, schedule)))
}

/// The CUDA backend on an emulated GPU with cooperative launches of at most so many blocks.
pub fn cuda_fused<E: CudaElement>(options: Options, blocks: u32) -> Cuda<E> {
    Cuda::on_driver(Arc::new(Emulated::new(options).cooperative(blocks)))
}

/// The CUDA backend on an emulated GPU.
pub fn cuda<E: CudaElement>(options: Options) -> Cuda<E> {
    Cuda::on_driver(Arc::new(Emulated::new(options)))
}

/// The CUDA backend, to run the other backends' tests on; on a real GPU if `SAE_KERNELS_REQUIRE_GPU=1`.
pub fn cudas<E: CudaElement>() -> Vec<Under<Staged<E>>> {
    if std::env::var("SAE_KERNELS_REQUIRE_GPU").is_ok_and(|value| value == "1") {
        let cuda = Cuda::<E>::new(0).unwrap_or_else(|error| panic!("SAE_KERNELS_REQUIRE_GPU=1: {error}"));
        return vec![Under::new(format!("{cuda:?}"), move || Staged(cuda.clone())).on(Where::Gpu)];
    }
    let under = Under::new(format!("{} on an emulated GPU", E::NAME), || Staged(cuda(Options::default())));
    // Kernels of all types are made of the same source. Small steps are one launch.
    let schedule = if E::NAME == "bf16" { Schedule::InTurn } else { Schedule::Together };
    let sm90 = move || Staged(Cuda::on_driver(Arc::new(Emulated::sm90(Options::default(), schedule).cooperative(3))));
    let sm90 = Under::new(format!("{} on an emulated GPU of 9.0", E::NAME), sm90);
    vec![under.on(Where::EmulatedGpu), sm90.on(Where::EmulatedGpu)]
}

/// Schedules, landings of copies and roundings that a kernel must not mind.
pub fn all_options() -> Vec<Options> {
    let mut all = vec![
        Options::default(),
        Options { schedule: ptx_emulator::Schedule::LastIn, asynchronous: Asynchronous::AtOnce, ..Options::default() },
    ];
    for (seed, rounding) in [Rounding::F32, Rounding::Exact, Rounding::Truncate].into_iter().enumerate() {
        all.push(Options {
            schedule: ptx_emulator::Schedule::Random(seed as u64),
            asynchronous: Asynchronous::Random,
            rounding,
            preemption: Some(50),
            ..Options::default()
        });
    }
    all
}
