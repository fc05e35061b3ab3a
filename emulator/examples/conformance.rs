//! Writes what the emulator makes of every kernel in `kernels/conformance.cu`, one line of hexadecimal words for each, to
//! compare with hardware: `cargo run --release -p ptx-emulator --example conformance > emulated.txt`

use ptx_emulator::{Device, Grid, Module, Options};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let module = Module::parse(include_str!("../tests/ptx/conformance.ptx"))?;
    let mut x = 1u64;
    let input: Vec<u32> = (0..1024)
        .map(|_| {
            x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (x >> 32) as u32
        })
        .collect();
    for kernel in module.kernels() {
        let mut device = Device::new(Options::default());
        let (from, to) = (device.upload(&input), device.upload(&[0u32; 1024]));
        device.launch(&module, kernel, Grid::linear(1, 32, 0), &[from.into(), to.into()])?;
        let out: Vec<u32> = device.download(to, 1024)?;
        let used = out.iter().rposition(|&w| w != 0).map_or(0, |i| i + 1);
        let words: Vec<String> = out[..used].iter().map(|w| format!("{w:08x}")).collect();
        println!("{kernel} {}", words.join(" "));
    }
    Ok(())
}
