// Runs the model that export.py compiled: libtorch, the library of bnbops' operators, and no Python.
//
//     classify LIBRARY PACKAGE TOKENS
//
// LIBRARY is what `python -m bnbops library` prints, PACKAGE a .pt2 file, TOKENS a text file with a sequence of token
// ids on each line, all of one length. Prints the logits, a line for each sequence.
#include <ATen/ops/from_blob.h>
#include <c10/core/InferenceMode.h>
#include <c10/util/Exception.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cstdint>
#include <cstdio>
#include <exception>
#include <fstream>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

// Registers bnbops::* with libtorch, whose dispatcher the compiled model asks for them.
void load_operators(const char* library) {
  if (dlopen(library, RTLD_NOW) == nullptr) throw std::runtime_error(dlerror());
}

at::Tensor read_tokens(const char* path) {
  std::ifstream file(path);
  if (!file) throw std::runtime_error(std::string("cannot read ") + path);
  std::vector<int64_t> tokens;
  int64_t sequences = 0, length = 0;
  for (std::string line; std::getline(file, line); ++sequences) {
    std::istringstream words(line);
    const size_t before = tokens.size();
    for (int64_t token = 0; words >> token;) tokens.push_back(token);
    const auto count = static_cast<int64_t>(tokens.size() - before);
    if (!words.eof() || count == 0 || (sequences > 0 && count != length)) {
      throw std::runtime_error(std::string(path) + ", line " + std::to_string(sequences + 1) +
                               ": expected as many integers as on the first line, at least one");
    }
    length = count;
  }
  return at::from_blob(tokens.data(), {sequences, length}, at::kLong).clone();
}

void print(const at::Tensor& logits) {
  const at::Tensor rows = logits.contiguous();
  const float* value = rows.const_data_ptr<float>();
  for (int64_t row = 0; row < rows.size(0); ++row) {
    for (int64_t column = 0; column < rows.size(1); ++column) std::printf("%s%.9g", column > 0 ? " " : "", *value++);
    std::printf("\n");
  }
}

void run(const char* library, const char* package, const char* tokens) {
  const c10::InferenceMode no_gradients;
  load_operators(library);
  torch::inductor::AOTIModelPackageLoader model(package);
  print(model.run({read_tokens(tokens)}).at(0));
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) {
    std::fprintf(stderr, "usage: %s LIBRARY PACKAGE TOKENS\n", argv[0]);
    return 2;
  }
  try {
    run(argv[1], argv[2], argv[3]);
  } catch (const c10::Error& error) {
    std::fprintf(stderr, "%s\n", error.what_without_backtrace());
    return 1;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return 0;
}
