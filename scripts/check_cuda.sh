#!/usr/bin/env bash
# Builds the program with the feature `cuda`, on any x86-64 Linux machine: no GPU, no driver and no installed CUDA needed.
# Compiles this project's own CUDA kernel for every generation of GPUs and prints its registers, shared memory and spills;
# then builds and links the program and checks which CUDA libraries it wants and how it starts without a driver.
#
#   scripts/check_cuda.sh            everything
#   scripts/check_cuda.sh toolkit    only fetch the toolkit, and print the environment that a build with it needs
#   scripts/check_cuda.sh kernel     only compile the kernel
#
# Variables: CUDA_COMPUTE_CAP (80), the GPU that candle's kernels are compiled for: 75, 80, 86, 89, 90, 100 or 120.
#
# The toolkit (CUDA 13.0, 1.2 GB unpacked) is put together once in .cache/cuda from NVIDIA's packages on PyPI; the program
# is built in target/cuda. Needs Python with pip, GCC with C++, and Rust. The first build takes long: candle's kernels are
# a hundred source files. Where CUDA is installed, none of this is needed: see "CUDA" in the README.
set -euo pipefail
cd "$(dirname "$0")/.."

packages=(
    nvidia-cuda-nvcc==13.0.88
    nvidia-cuda-crt==13.0.88
    nvidia-nvvm==13.0.88
    nvidia-cuda-runtime==13.0.96
    nvidia-cuda-cccl==13.0.85
    nvidia-cuda-nvrtc==13.0.88
    nvidia-cublas==13.1.0.3
    nvidia-curand==10.4.0.35
)
step() { printf '\n== %s\n' "$*"; }
fail() { echo "error: $*" >&2; exit 1; }

what=${1:-all}
case $what in all | toolkit | kernel) ;; *) fail "expected \`toolkit\`, \`kernel\` or nothing, got \`$what\`" ;; esac
for tool in python3 g++ gcc cargo readelf; do
    command -v "$tool" >/dev/null || fail "\`$tool\` is needed"
done

# The driver's library comes with a driver, never with pip. Linking needs only its names: a library that has every
# function of the driver that cudarc declares, and answers each with CUDA_ERROR_STUB_LIBRARY, as NVIDIA's own stub does.
make_driver_stub() {
    local stubs=$1 manifest
    manifest=$(cargo metadata --locked --format-version 1 --features cuda |
        python3 -c 'import json, sys
print(next(p["manifest_path"] for p in json.load(sys.stdin)["packages"] if p["name"] == "cudarc"))')
    grep -oE 'fn cu[A-Z][A-Za-z0-9_]*' "$(dirname "$manifest")/src/driver/sys/mod.rs" | sort -u |
        sed -E 's/^fn (.*)$/int \1(void) { return 34; }/' >"$stubs/libcuda.c"
    gcc -shared -fPIC -w -Wl,-soname,libcuda.so.1 -o "$stubs/libcuda.so" "$stubs/libcuda.c"
    ln -sf libcuda.so "$stubs/libcuda.so.1"
}

# Where a toolkit has `lib64`, libraries without a version, and stubs, the packages have none of them.
make_toolkit() {
    echo "fetching CUDA (600 MB, once) ..." >&2
    rm -rf "$toolkit.part"
    mkdir -p "$toolkit.part"
    python3 -m pip install --quiet --disable-pip-version-check --root-user-action=ignore --no-deps \
        --target "$toolkit.part/site" "${packages[@]}"
    local root=$toolkit.part/site/nvidia/cu13 library
    [ -x "$root/bin/nvcc" ] || fail "no bin/nvcc in the packages; expected it at $root/bin/nvcc"
    for library in cudart cublas cublasLt curand nvrtc; do
        (cd "$root/lib" && ln -s "$(ls "lib$library".so.*)" "lib$library.so")
    done
    ln -s lib "$root/lib64"
    mkdir "$root/lib/stubs"
    make_driver_stub "$root/lib/stubs"
    printf '%s\n' "${packages[@]}" >"$toolkit.part/packages"
    rm -rf "$toolkit"
    mv "$toolkit.part" "$toolkit"
}

toolkit=$PWD/.cache/cuda
if [ "$(cat "$toolkit/packages" 2>/dev/null)" != "$(printf '%s\n' "${packages[@]}")" ]; then make_toolkit; fi
export CUDA_HOME=$toolkit/site/nvidia/cu13
export CUDA_PATH=$CUDA_HOME NVCC=$CUDA_HOME/bin/nvcc PATH=$CUDA_HOME/bin:$PATH
export CUDA_COMPUTE_CAP=${CUDA_COMPUTE_CAP:-80}

if [ "$what" = toolkit ]; then
    printf 'export %s\n' "CUDA_HOME=$CUDA_HOME" "CUDA_PATH=$CUDA_HOME" "NVCC=$NVCC" "PATH=$CUDA_HOME/bin:\$PATH" \
        "CUDA_COMPUTE_CAP=$CUDA_COMPUTE_CAP"
    exit
fi
