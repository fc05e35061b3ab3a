//! Loads PTX files and lists their kernels: `cargo run -p ptx-emulator --example load -- kernels.ptx`

fn main() {
    let mut failed = false;
    for path in std::env::args().skip(1) {
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) => {
                eprintln!("{path}: {error}");
                failed = true;
                continue;
            }
        };
        match ptx_emulator::Module::parse(&text) {
            Ok(module) => {
                for kernel in module.kernels() {
                    let parameters = module.parameters(kernel).unwrap_or_default();
                    println!("{path}: {kernel} {parameters:?}");
                }
            }
            Err(error) => {
                eprintln!("{path}: {error}");
                failed = true;
            }
        }
    }
    std::process::exit(failed.into());
}
