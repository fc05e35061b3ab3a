//! An emulated GPU behind the CUDA backend's device trait: it executes the PTX that the build left, checks every access, and panics at
//! the first broken rule.

use super::Under;
use super::staged::Staged;
use ptx_emulator::{Argument, Asynchronous, Device, Fault, Grid, LaunchStats, Module, Options, Rounding, Schedule};
use sae_kernels::cuda_driver::{Driver, FAMILIES, Launch, PTX_DIR};
use sae_kernels::{Cuda, CudaElement};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock};

/// Every kernel, by its name.
fn modules() -> &'static HashMap<&'static str, Arc<Module>> {
    static MODULES: OnceLock<HashMap<&'static str, Arc<Module>>> = OnceLock::new();
    MODULES.get_or_init(|| {
        let folder = PTX_DIR.expect("the build left PTX");
        let mut modules = HashMap::new();
        for (family, kernels) in FAMILIES {
            let text = std::fs::read_to_string(format!("{folder}/{family}.ptx")).unwrap();
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
pub struct Emulated(Mutex<Device>);

impl Emulated {
    pub fn new(options: Options) -> Self {
        // What the smallest of the GPUs has.
        Self(Mutex::new(Device::new(Options { shared_limit: 99 << 10, ..options })))
    }

    /// The device as it stands now.
    pub fn snapshot(&self) -> Device {
        self.0.lock().unwrap().clone()
    }

    /// Runs a kernel, and panics at the first broken rule.
    pub fn run(&self, launch: &Launch) -> LaunchStats {
        let result = launch_on(&mut self.0.lock().unwrap(), &modules()[launch.kernel], launch);
        result.unwrap_or_else(|fault| panic!("{fault}"))
    }
}

/// Launches a kernel of a module as the backend would.
pub fn launch_on(device: &mut Device, module: &Module, launch: &Launch) -> Result<LaunchStats, Fault> {
    let grid = Grid {
        grid: [launch.grid[0], launch.grid[1], 1],
        block: [launch.threads, 1, 1],
        shared_bytes: launch.shared_bytes,
        cooperative: false,
    };
    device.launch(module, launch.kernel, grid, &[Argument::bytes(launch.argument.bytes())])
}

type Outcome<T> = sae_kernels::Result<T>;

impl Driver for Emulated {
    fn alloc(&self, bytes: usize) -> Outcome<u64> {
        let mut device = self.0.lock().unwrap();
        let address = device.alloc(bytes);
        device.write(address, &vec![0; bytes]).unwrap();
        Ok(address)
    }
    unsafe fn free(&self, address: u64) {
        // A poisoned lock means that a test has failed already.
        if let Ok(mut device) = self.0.lock() {
            assert!(device.free(address), "{address:#x} is not a live allocation");
        }
    }
    unsafe fn upload(&self, source: &[u8], target: u64) -> Outcome<()> {
        self.0.lock().unwrap().write(target, source).unwrap();
        Ok(())
    }
    unsafe fn download(&self, source: u64, target: &mut [u8]) -> Outcome<()> {
        target.copy_from_slice(&self.0.lock().unwrap().read(source, target.len()).unwrap());
        Ok(())
    }
    unsafe fn launch(&self, launch: &Launch) -> Outcome<()> {
        self.run(launch);
        Ok(())
    }
    fn name(&self) -> String {
        "an emulated GPU".into()
    }
}

/// The CUDA backend on an emulated GPU.
pub fn cuda<E: CudaElement>(options: Options) -> Cuda<E> {
    Cuda::on_driver(Arc::new(Emulated::new(options)))
}

/// The CUDA backend, to run the other backends' tests on; on a real GPU if `SAE_KERNELS_REQUIRE_GPU=1`.
pub fn cudas<E: CudaElement>() -> Vec<Under<Staged<E>>> {
    if std::env::var("SAE_KERNELS_REQUIRE_GPU").is_ok_and(|value| value == "1") {
        let cuda = Cuda::<E>::new(0).unwrap_or_else(|error| panic!("SAE_KERNELS_REQUIRE_GPU=1: {error}"));
        return vec![Under::new(format!("{cuda:?}"), move || Staged(cuda.clone()))];
    }
    // Races do not depend on numbers: tests/cuda.rs looks for them, at a quarter of the speed.
    let options = Options { check_races: false, ..Options::default() };
    vec![Under::new(format!("{} on an emulated GPU", E::NAME), move || Staged(cuda(options.clone())))]
}

/// Schedules, landings of copies and roundings that a kernel must not mind.
pub fn all_options() -> Vec<Options> {
    let mut all = vec![
        Options::default(),
        Options { schedule: Schedule::LastIn, asynchronous: Asynchronous::AtOnce, ..Options::default() },
    ];
    for (seed, rounding) in [Rounding::F32, Rounding::Exact, Rounding::Truncate].into_iter().enumerate() {
        all.push(Options {
            schedule: Schedule::Random(seed as u64),
            asynchronous: Asynchronous::Random,
            rounding,
            preemption: Some(50),
            ..Options::default()
        });
    }
    all
}
