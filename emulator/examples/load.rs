//! Lists the kernels of PTX files, and why one cannot be run: `cargo run -p ptx-emulator --example load -- kernels.ptx`

use ptx_emulator::Module;

fn main() {
    let mut failed = false;
    let mut fail = |path: &str, error: &dyn std::fmt::Display| {
        eprintln!("{path}: {error}");
        failed = true;
    };
    for path in std::env::args().skip(1) {
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) => {
                fail(&path, &error);
                continue;
            }
        };
        match Module::open(&text) {
            Ok(mut module) => {
                let kernels: Vec<String> = module.kernels().into_iter().map(String::from).collect();
                for kernel in kernels {
                    match module.prepare(&kernel) {
                        Ok(()) => println!("{path}: {kernel} {:?}", module.parameters(&kernel).unwrap_or_default()),
                        Err(error) => fail(&path, &format_args!("{kernel}: {error}")),
                    }
                }
            }
            Err(error) => fail(&path, &error),
        }
    }
    std::process::exit(failed.into());
}
