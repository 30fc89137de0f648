// A safetensors file as tensors by name: eight bytes of length, a JSON header, then the bytes of the tensors.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <iterator>

#include <torch/script.h>

#include "json.hpp"

namespace dlops {

inline std::string read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::string content{std::istreambuf_iterator<char>(file), {}};
  if (!file.is_open() || file.bad() || content.empty()) throw BadInput(path + ": missing, empty or not readable");
  return content;
}

// Throws BadInput where the file is cut short, or its header speaks of what is not there.
inline std::map<std::string, torch::Tensor> read_safetensors(const std::string& path) {
  static const std::map<std::string, torch::ScalarType> types = {
      {"F32", torch::kFloat32}, {"F64", torch::kFloat64}, {"F16", torch::kFloat16}, {"BF16", torch::kBFloat16},
      {"I64", torch::kInt64},   {"I32", torch::kInt32},   {"I16", torch::kInt16},   {"I8", torch::kInt8},
      {"U8", torch::kUInt8},    {"BOOL", torch::kBool},
  };
  const std::string content = read_file(path);
  uint64_t header = 0;  // little-endian, as are all machines that LibTorch is built for
  if (content.size() < sizeof header) throw BadInput(path + ": cut short");
  std::memcpy(&header, content.data(), sizeof header);
  if (header > content.size() - sizeof header) throw BadInput(path + ": cut short, or no safetensors file");
  const uint64_t start = sizeof header + header, held = content.size() - start;
  std::map<std::string, torch::Tensor> tensors;
  for (const auto& [name, entry] : Json::parse(content.substr(sizeof header, header)).object) {
    if (name == "__metadata__") continue;
    auto type = types.find(entry.at("dtype").text);
    if (type == types.end()) throw BadInput(path + ": " + name + " has the dtype " + entry.at("dtype").text);
    std::vector<int64_t> shape;
    double bytes = double(torch::elementSize(type->second));
    for (const Json& dim : entry.at("shape").list) {
      shape.push_back(int64_t(dim.number));
      bytes *= dim.number;
    }
    const auto& ends = entry.at("data_offsets").list;
    if (ends.size() != 2 || !(ends[0].number >= 0) || ends[1].number - ends[0].number != bytes || bytes < 0 ||
        ends[1].number > double(held)) {
      throw BadInput(path + ": " + name + " does not lie within the file");
    }
    torch::Tensor tensor = torch::empty(shape, type->second);
    if (bytes > 0) std::memcpy(tensor.data_ptr(), content.data() + start + uint64_t(ends[0].number), size_t(bytes));
    tensors[name] = tensor;
  }
  return tensors;
}

}  // namespace dlops
