//! Compiles this project's CUDA kernels to PTX, if the feature `cuda` is on; does nothing otherwise.
//!
//! `nvcc` is found as candle's own build finds it: `NVCC`, the `PATH`, `CUDA_HOME`. The PTX is for the GPU that
//! `CUDA_COMPUTE_CAP` names, or the one in this machine, and for later ones.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    #[cfg(feature = "cuda")]
    ragged_decode();
}

#[cfg(feature = "cuda")]
fn ragged_decode() {
    const KERNELS: &str = "src/attention/ragged/kernels";
    println!("cargo:rerun-if-changed={KERNELS}");
    let folder = std::path::PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let built = cudaforge::KernelBuilder::new()
        .source_dir(KERNELS)
        .watch([format!("{KERNELS}/ragged_decode.cuh")])
        .arg("-std=c++17")
        .arg("-O3")
        .build_ptx()
        .and_then(|ptx| ptx.write(folder.join("ragged_ptx.rs")));
    if let Err(error) = built {
        eprintln!("error: failed to compile `{KERNELS}` with nvcc: {error}");
        eprintln!("hint: set CUDA_HOME to a CUDA toolkit, or see scripts/check_cuda.sh");
        std::process::exit(1);
    }
}
