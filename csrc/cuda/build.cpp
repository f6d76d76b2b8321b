// What built this library, and for which GPUs. bnbops/cuda_build.py reads it from the file: it is to be known also
// where the library does not load, which is when people ask.
namespace bnbops::cuda {

// As CMake has them: "90-real" is machine code for compute capability 9.0, "120-virtual" PTX for 12.0 and later.
extern const char kBuild[];
__attribute__((used)) const char kBuild[] =
    "bnbops-cuda-build toolkit=" BNBOPS_CUDA_TOOLKIT " architectures=" BNBOPS_CUDA_ARCHITECTURES;

}  // namespace bnbops::cuda
