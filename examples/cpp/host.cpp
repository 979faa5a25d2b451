// Run a packaged model without Python and swap its adapter: copies into the constants that the compiled code reads.
//
//     host model.pt2 inputs.safetensors slots.safetensors ...
//
// inputs.safetensors holds the inputs, named "0", "1", ... in the order of the model's arguments. Each slots file
// is one adapter, as Package.save_slots wrote it; for each one the model runs, and its first output is written
// beside it as raw numbers, slots.safetensors.out. Build (T: the folder that python -c "import torch;
// print(torch.__path__[0])" prints; the CMakeLists.txt beside this file says the same to cmake):
//
//     g++ -std=c++20 -O1 host.cpp -o host -I$T/include -I$T/include/torch/csrc/api/include
//         -L$T/lib -ltorch -ltorch_cpu -lc10 -Wl,-rpath,$T/lib
#include <ATen/ops/empty.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <chrono>
#include <cstring>
#include <fstream>
#include <iostream>
#include <map>
#include <regex>

using Tensors = std::unordered_map<std::string, at::Tensor>;

// safetensors: the length of the header, the header (JSON), the tensors' bytes.
Tensors read_safetensors(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  uint64_t length = 0;
  if (!file.read(reinterpret_cast<char*>(&length), 8) || length > (100u << 20)) {
    throw std::runtime_error(path + ": missing or no safetensors file");
  }
  std::string header(length, '\0');
  file.read(header.data(), static_cast<std::streamsize>(length));
  const std::map<std::string, at::ScalarType> types = {
      {"F32", at::kFloat}, {"BF16", at::kBFloat16}, {"F16", at::kHalf}, {"I64", at::kLong}, {"U8", at::kByte},
      {"BOOL", at::kBool}};
  const std::regex entry(
      R"re("([^"]+)":\{"dtype":"(\w+)","shape":\[([\d,]*)\],"data_offsets":\[(\d+),(\d+)\]\})re");
  Tensors found;
  for (std::sregex_iterator it(header.begin(), header.end(), entry), end; it != end; ++it) {
    std::vector<int64_t> shape;
    std::stringstream sizes((*it)[3].str());
    for (std::string size; std::getline(sizes, size, ',');) {
      shape.push_back(std::stoll(size));
    }
    const auto from = std::stoull((*it)[4]), to = std::stoull((*it)[5]);
    at::Tensor tensor = at::empty(shape, at::TensorOptions().dtype(types.at((*it)[2])));
    if (tensor.nbytes() != to - from) {
      throw std::runtime_error(path + ": damaged at " + (*it)[1].str());
    }
    file.seekg(static_cast<std::streamoff>(8 + length + from));
    if (!file.read(static_cast<char*>(tensor.data_ptr()), static_cast<std::streamsize>(to - from))) {
      throw std::runtime_error(path + ": cut short");
    }
    found[(*it)[1]] = tensor;
  }
  return found;
}

int main(int count, char** arguments) try {
  if (count < 4) {
    throw std::runtime_error("usage: host model.pt2 inputs.safetensors slots.safetensors ...");
  }
  torch::inductor::AOTIModelPackageLoader model(arguments[1]);
  const Tensors named = read_safetensors(arguments[2]);
  for (int i = 3; i < count; ++i) {
    Tensors slots = read_safetensors(arguments[i]);
    std::vector<at::Tensor> inputs;
    for (size_t n = 0; n < named.size(); ++n) {
      inputs.push_back(named.at(std::to_string(n)));
    }
    if (auto rank = slots.extract("active_rank"); !rank.empty()) {
      inputs.push_back(rank.mapped());  // its size is the number of ranks that are computed
    }
    const auto start = std::chrono::steady_clock::now();
    model.load_constants(slots, /*use_inactive=*/false, /*check_full_update=*/false);
    const std::chrono::duration<double, std::milli> swap = std::chrono::steady_clock::now() - start;
    const at::Tensor output = model.run(inputs).at(0).contiguous();
    std::ofstream(std::string(arguments[i]) + ".out", std::ios::binary)
        .write(static_cast<const char*>(output.data_ptr()), static_cast<std::streamsize>(output.nbytes()));
    std::cout << arguments[i] << ": " << slots.size() << " tensors swapped in " << swap.count() << " ms\n";
  }
  return 0;
} catch (const std::exception& error) {
  std::cerr << error.what() << "\n";
  return 1;
}
