//! What the host sees: modules, memory, launches.

use std::{
    collections::HashMap,
    sync::atomic::{AtomicU64, Ordering},
};

use crate::{
    Fault, LoadError, Rule, decode,
    machine::{self, Env},
    memory::Global,
    parse::{self, Source, Space},
    program::Kernel,
    report::{Place, RawFault, RawPlace, coordinates, source_line},
    rng::Rng,
};

/// An address in the emulated device's global memory.
pub type DevicePointer = u64;

/// In what order ready threads run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Schedule {
    /// The thread that has been ready longest.
    FirstIn,
    /// The thread that has become ready last.
    LastIn,
    /// Any, from this seed.
    Random(u64),
}

/// When asynchronous work lands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asynchronous {
    /// As late as the ISA allows: when it is waited for.
    Late,
    /// At once, when it is issued.
    AtOnce,
    /// Either, at random.
    Random,
}

/// How a matrix instruction rounds. A tolerance must hold in all three.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rounding {
    /// Every product added in f32, one after the other.
    F32,
    /// The exact sum, rounded once.
    Exact,
    /// Aligned to the largest term, cut, summed, cut: a pessimistic tensor core.
    Truncate,
}

/// How a device behaves and what it checks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// In what order ready threads run.
    pub schedule: Schedule,
    /// When asynchronous work lands.
    pub asynchronous: Asynchronous,
    /// How a matrix instruction rounds.
    pub rounding: Rounding,
    /// Also switch threads after about this many instructions.
    pub preemption: Option<u32>,
    /// Look for races, in shared and global memory.
    pub check_races: bool,
    /// Fault on a read of memory that nothing has written.
    pub check_uninitialised: bool,
    /// The most instructions one thread may execute.
    pub instruction_limit: u64,
    /// Shared memory of one block, in bytes: 99 KiB on sm_86 and sm_89, 163 KiB on sm_80, 227 KiB on sm_90.
    pub shared_limit: u32,
    /// How many blocks are on the machine at the same time; a cooperative launch puts all there.
    pub resident_blocks: u32,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            schedule: Schedule::FirstIn,
            asynchronous: Asynchronous::Late,
            rounding: Rounding::F32,
            preemption: None,
            check_races: true,
            check_uninitialised: true,
            instruction_limit: 10_000_000,
            shared_limit: 163 << 10,
            resident_blocks: 1,
        }
    }
}

/// The shape of a launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grid {
    /// Blocks in x, y and z.
    pub grid: [u32; 3],
    /// Threads of a block in x, y and z.
    pub block: [u32; 3],
    /// Dynamic shared memory.
    pub shared_bytes: u32,
    /// All blocks are on the machine at the same time and may wait for each other.
    pub cooperative: bool,
    /// Blocks of a cluster in x, y and z; the grid is a multiple of it.
    pub cluster: [u32; 3],
}

impl Grid {
    /// A one-dimensional launch.
    pub fn linear(blocks: u32, threads: u32, shared_bytes: u32) -> Grid {
        Grid { grid: [blocks, 1, 1], block: [threads, 1, 1], shared_bytes, cooperative: false, cluster: [1; 3] }
    }

    /// The same in clusters.
    pub fn clusters(self, cluster: [u32; 3]) -> Grid {
        Grid { cluster, ..self }
    }
}

/// An argument of a kernel: its bytes, which must fit the parameter exactly.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Argument(Vec<u8>);

impl Argument {
    /// A structure passed by value.
    pub fn bytes(bytes: &[u8]) -> Argument {
        Argument(bytes.to_vec())
    }
}

macro_rules! argument {
    ($($t:ty),*) => {
        $(impl From<$t> for Argument {
            fn from(v: $t) -> Argument {
                Argument(v.to_le_bytes().to_vec())
            }
        })*
    };
}
argument!(u8, i8, u16, i16, u32, i32, u64, i64, f32, f64);

/// What a launch did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LaunchStats {
    /// Instructions, counted once for each thread.
    pub instructions: u64,
    /// `ldmatrix`: matrices read.
    pub matrix_reads: u64,
    /// Shared-memory wavefronts they took: equal to `matrix_reads` without bank conflicts.
    pub matrix_wavefronts: u64,
}

static NEXT_MODULE: AtomicU64 = AtomicU64::new(1);

/// What a kernel was compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attributes {
    /// Static shared memory, in bytes.
    pub static_shared: u32,
    /// Local memory of a thread, in bytes.
    pub local_bytes: usize,
    /// The largest block, from its launch bounds.
    pub max_threads: Option<u32>,
    /// Blocks that a multiprocessor certainly has room for, from its launch bounds.
    pub min_blocks: Option<u32>,
    /// Blocks of a cluster in x, y and z.
    pub cluster: Option<[u32; 3]>,
}

/// PTX text: kernels that are ready to run.
#[derive(Clone, Debug)]
pub struct Module {
    id: u64,
    source: Source,
    kernels: HashMap<String, Kernel>,
}

impl Module {
    /// Reads PTX text, checks and decodes it. Anything unknown in any kernel is an error here.
    pub fn parse(ptx: &str) -> Result<Module, LoadError> {
        let mut module = Module::open(ptx)?;
        let names: Vec<String> = module.source.kernels().map(str::to_string).collect();
        names.iter().try_for_each(|name| module.prepare(name))?;
        Ok(module)
    }

    /// Reads no more of PTX text than what its kernels are called: each of them can be launched once it is [prepared](Self::prepare).
    pub fn open(ptx: &str) -> Result<Module, LoadError> {
        let id = NEXT_MODULE.fetch_add(1, Ordering::Relaxed);
        Ok(Module { id, source: parse::outline(ptx)?, kernels: HashMap::new() })
    }

    /// Makes a kernel ready to run. Anything unknown in it, or in a function that it calls, is an error here.
    pub fn prepare(&mut self, kernel: &str) -> Result<(), LoadError> {
        if self.kernels.contains_key(kernel) {
            return Ok(());
        }
        self.source.read(kernel)?;
        let missing =
            || LoadError { line: 0, text: kernel.to_string(), reason: "no such kernel in the module".to_string() };
        let function = self.source.functions.iter().find(|f| f.entry && f.name == kernel).ok_or_else(missing)?;
        self.kernels.insert(kernel.to_string(), decode::kernel(&self.source, function)?);
        Ok(())
    }

    /// The chip that the text is for: `sm_80`.
    pub fn target(&self) -> &str {
        &self.source.target
    }

    /// The names of the kernels, sorted.
    pub fn kernels(&self) -> Vec<&str> {
        let mut names: Vec<&str> = self.source.kernels().collect();
        names.sort_unstable();
        names
    }

    /// The bytes of each parameter of a kernel that is ready.
    pub fn parameters(&self, kernel: &str) -> Option<Vec<usize>> {
        Some(self.kernels.get(kernel)?.parameters.iter().map(|p| p.size).collect())
    }

    /// What a kernel that is ready was compiled for.
    pub fn attributes(&self, kernel: &str) -> Option<Attributes> {
        let &Kernel { static_shared, local_bytes, max_threads, min_blocks, cluster, .. } = self.kernels.get(kernel)?;
        Some(Attributes { static_shared, local_bytes, max_threads, min_blocks, cluster })
    }

    fn file(&self, index: u32) -> String {
        let name = self.source.files.get(&index).map_or("?", String::as_str);
        name.rsplit('/').next().unwrap_or(name).to_string()
    }
}

/// An emulated device. A clone has the same memory at the same addresses.
#[derive(Clone, Debug)]
pub struct Device {
    options: Options,
    global: Global,
    /// Where a module's variables in global and constant memory are.
    symbols: HashMap<(u64, u32), DevicePointer>,
    launches: u64,
}

impl Device {
    /// A device with empty memory.
    pub fn new(options: Options) -> Device {
        let global = Global::new(options.check_races, options.check_uninitialised);
        Device { options, global, symbols: HashMap::new(), launches: 0 }
    }

    /// The device's options.
    pub fn options(&self) -> &Options {
        &self.options
    }

    /// Uninitialised memory, which reads as NaN. Never fails; an empty allocation has an address too.
    pub fn alloc(&mut self, bytes: usize) -> DevicePointer {
        self.global.alloc(bytes)
    }

    /// Gives memory back; a later access to it is a fault. False if `pointer` is not a live allocation's start.
    pub fn free(&mut self, pointer: DevicePointer) -> bool {
        self.global.free(pointer)
    }

    /// Copies to the device.
    pub fn write(&mut self, pointer: DevicePointer, data: &[u8]) -> Result<(), Fault> {
        if data.is_empty() {
            return Ok(());
        }
        let (memory, offset) = self.global.host(pointer, data.len(), "write").map_err(|f| host_fault(*f))?;
        memory.fill_from_host(offset, data);
        Ok(())
    }

    /// Copies from the device. What was never written reads as 0xFF bytes, NaN in every floating-point format.
    pub fn read(&mut self, pointer: DevicePointer, bytes: usize) -> Result<Vec<u8>, Fault> {
        if bytes == 0 {
            return Ok(Vec::new());
        }
        let (memory, offset) = self.global.host(pointer, bytes, "read").map_err(|f| host_fault(*f))?;
        Ok(memory.bytes[offset..offset + bytes].to_vec())
    }

    /// Makes an allocation uninitialised again.
    pub fn forget(&mut self, pointer: DevicePointer) -> Result<(), Fault> {
        self.global.host(pointer, 1, "forget").map_err(|f| host_fault(*f))?.0.forget();
        Ok(())
    }

    /// The offset of the first byte of an allocation that nothing has written.
    pub fn first_unwritten(&mut self, pointer: DevicePointer) -> Result<Option<usize>, Fault> {
        Ok(self.global.host(pointer, 1, "look").map_err(|f| host_fault(*f))?.0.first_unwritten())
    }

    /// A clone that looks for no races, and runs faster.
    pub fn clone_without_race_checks(&self) -> Device {
        let mut clone = self.clone();
        clone.options.check_races = false;
        clone.global.look_for_no_races();
        clone
    }

    /// The first address whose byte differs between a device and its clone; memory that only one of them has is not looked at.
    pub fn first_difference(&self, clone: &Device) -> Option<DevicePointer> {
        self.global.first_difference(&clone.global)
    }

    /// Copies values to fresh memory.
    pub fn upload<T: Bytes>(&mut self, values: &[T]) -> DevicePointer {
        let mut data = Vec::with_capacity(size_of_val(values));
        values.iter().for_each(|v| v.append_to(&mut data));
        let pointer = self.alloc(data.len());
        if let (false, Ok((memory, offset))) = (data.is_empty(), self.global.host(pointer, data.len(), "write")) {
            memory.fill_from_host(offset, &data);
        }
        pointer
    }

    /// Copies `count` values from the device.
    pub fn download<T: Bytes>(&mut self, pointer: DevicePointer, count: usize) -> Result<Vec<T>, Fault> {
        let size = size_of::<T>();
        Ok(self.read(pointer, count * size)?.chunks_exact(size).map(T::from_bytes).collect())
    }

    /// Whether a range lies in one live allocation: the fault of a copy that would read it, if not.
    pub fn check(&mut self, pointer: DevicePointer, bytes: usize) -> Result<(), Fault> {
        if bytes > 0 {
            self.global.host(pointer, bytes, "access").map_err(|f| host_fault(*f))?;
        }
        Ok(())
    }

    /// Copies within the device; what was not written is not written there either.
    pub fn copy(&mut self, from: DevicePointer, to: DevicePointer, bytes: usize) -> Result<(), Fault> {
        if bytes == 0 {
            return Ok(());
        }
        let (memory, offset) = self.global.host(from, bytes, "read").map_err(|f| host_fault(*f))?;
        let part = memory.part(offset, bytes);
        let (memory, offset) = self.global.host(to, bytes, "write").map_err(|f| host_fault(*f))?;
        memory.fill_from_part(offset, part);
        Ok(())
    }

    /// Where a module's variable in global or constant memory is, and its bytes.
    pub fn variable(&mut self, module: &Module, name: &str) -> Option<(DevicePointer, usize)> {
        self.place_variables(module);
        let i = module.source.variables.iter().position(|v| v.name == name)?;
        Some((*self.symbols.get(&(module.id, i as u32))?, module.source.variables[i].size as usize))
    }

    /// Gives memory to a module's variables, once.
    fn place_variables(&mut self, module: &Module) {
        for (i, v) in module.source.variables.iter().enumerate() {
            if matches!(v.space, Space::Global | Space::Const) && !self.symbols.contains_key(&(module.id, i as u32)) {
                let pointer = self.global.alloc(v.size as usize);
                // Device variables without an initialiser are zero.
                let mut data = v.initial.clone();
                data.resize(v.size as usize, 0);
                if let (false, Ok((memory, offset))) = (data.is_empty(), self.global.host(pointer, data.len(), "write"))
                {
                    memory.fill_from_host(offset, &data);
                }
                self.symbols.insert((module.id, i as u32), pointer);
            }
        }
    }

    /// Runs a kernel to its end, or to the first broken rule.
    pub fn launch(
        &mut self,
        module: &Module,
        kernel: &str,
        grid: Grid,
        arguments: &[Argument],
    ) -> Result<LaunchStats, Fault> {
        let refuse = |message: String| Fault {
            rule: Rule::Launch,
            kernel: kernel.to_string(),
            message,
            here: None,
            other: None,
            address: None,
        };
        let Some(k) = module.kernels.get(kernel) else { return Err(refuse("no such kernel in the module".into())) };
        let threads = grid.block.iter().map(|&n| u64::from(n)).product::<u64>();
        let limit = u64::from(k.max_threads.unwrap_or(1024)).min(1024);
        if threads == 0 || threads > limit {
            return Err(refuse(format!("a block of {threads} threads, of 1 to {limit}")));
        }
        let ([gx, gy, gz], [_, _, bz]) = (grid.grid, grid.block);
        if gx == 0 || gy == 0 || gz == 0 || gx > i32::MAX as u32 || gy > 65535 || gz > 65535 || bz > 64 {
            return Err(refuse(format!("a grid of {gx} x {gy} x {gz} blocks")));
        }
        let size = grid.cluster.iter().map(|&n| u64::from(n)).product::<u64>();
        if !(1..=8).contains(&size) || (0..3).any(|i| !grid.grid[i].is_multiple_of(grid.cluster[i])) {
            let [x, y, z] = grid.cluster;
            return Err(refuse(format!("clusters of {x} x {y} x {z} blocks: at most 8, and the grid a multiple")));
        }
        if let Some(want) = k.cluster.filter(|want| *want != grid.cluster) {
            return Err(refuse(format!("the kernel was compiled for clusters of {want:?} blocks")));
        }
        let aligned = k.static_shared.next_multiple_of(k.dynamic_align.max(1));
        let start = if grid.shared_bytes > 0 { aligned } else { k.static_shared };
        let shared_bytes = start.saturating_add(grid.shared_bytes);
        if shared_bytes > self.options.shared_limit {
            let limit = self.options.shared_limit;
            return Err(refuse(format!("{shared_bytes} bytes of shared memory, the limit is {limit}")));
        }
        if k.static_shared > 48 << 10 {
            return Err(refuse(format!("{} bytes of static shared memory, of at most 48 KiB", k.static_shared)));
        }
        if arguments.len() != k.parameters.len() {
            return Err(refuse(format!("{} arguments for {} parameters", arguments.len(), k.parameters.len())));
        }
        let mut parameters = vec![0; k.parameter_bytes];
        for (i, (Argument(bytes), p)) in arguments.iter().zip(&k.parameters).enumerate() {
            if bytes.len() != p.size {
                return Err(refuse(format!("argument {i} has {} bytes, its parameter {}", bytes.len(), p.size)));
            }
            parameters[p.offset..p.offset + p.size].copy_from_slice(bytes);
        }
        self.place_variables(module);
        self.global.new_launch();
        self.launches += 1;
        let seed = if let Schedule::Random(seed) = self.options.schedule { seed } else { 0 };
        let blocks = gx.saturating_mul(gy).saturating_mul(gz);
        let resident = if grid.cooperative { blocks } else { self.options.resident_blocks };
        let symbols = &self.symbols;
        let mut env = Env {
            kernel: k,
            options: &self.options,
            global: &mut self.global,
            parameters: &parameters,
            locations: HashMap::new(),
            rng: Rng::new(seed.wrapping_add(self.launches)),
            executed: 0,
            phases: 0,
            wavefronts: 0,
            grid: grid.grid,
            block: grid.block,
            cluster: grid.cluster,
        };
        let symbol = |i: u32| symbols.get(&(module.id, i)).copied().unwrap_or(0);
        match machine::run_grid(&mut env, resident, shared_bytes, &symbol) {
            Ok(()) => Ok(LaunchStats {
                instructions: env.executed,
                matrix_reads: env.phases,
                matrix_wavefronts: env.wavefronts,
            }),
            Err(raw) => Err(name_places(module, k, grid, *raw)),
        }
    }
}

fn host_fault(raw: RawFault) -> Fault {
    Fault {
        rule: raw.rule,
        kernel: "(host)".into(),
        message: raw.message,
        here: None,
        other: None,
        address: raw.address,
    }
}

fn name_places(module: &Module, kernel: &Kernel, grid: Grid, raw: RawFault) -> Fault {
    let place = |p: RawPlace| {
        let (file, line, inlined, ptx_line) = source_line(kernel, &|i| module.file(i), p.at);
        Box::new(Place {
            what: p.what,
            file,
            line,
            inlined,
            ptx_line,
            block: coordinates(p.block.saturating_sub(1), grid.grid),
            thread: coordinates(p.thread, grid.block),
        })
    };
    Fault {
        rule: raw.rule,
        kernel: kernel.name.clone(),
        message: raw.message,
        here: raw.here.map(place),
        other: raw.other.map(place),
        address: raw.address,
    }
}

/// Plain numbers that `upload` and `download` copy.
pub trait Bytes: Sized {
    /// Appends the bytes, little-endian.
    fn append_to(&self, bytes: &mut Vec<u8>);
    /// From as many bytes as the type has.
    fn from_bytes(bytes: &[u8]) -> Self;
}

macro_rules! numbers {
    ($($t:ty),*) => {
        $(impl Bytes for $t {
            fn append_to(&self, bytes: &mut Vec<u8>) {
                bytes.extend_from_slice(&self.to_le_bytes());
            }
            fn from_bytes(bytes: &[u8]) -> Self {
                let mut array = [0; size_of::<$t>()];
                array.copy_from_slice(bytes);
                <$t>::from_le_bytes(array)
            }
        })*
    };
}
numbers!(u8, i8, u16, i16, u32, i32, u64, i64, f32, f64, half::f16, half::bf16);
