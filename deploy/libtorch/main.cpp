// Runs a TorchScript artifact of dlops without Python, and checks it on the samples that it carries.
//
// Ends with 0 where every output is within the tolerance that the artifact records, 1 where one is not, and 2 where the
// artifact cannot be read or run. As any TorchScript file, it is a program: run those of people whom you trust.
#include <algorithm>
#include <iostream>

#include <torch/script.h>

#include "json.hpp"
#include "safetensors.hpp"

using dlops::BadInput;
using dlops::Json;

namespace {

using Tensors = std::vector<torch::Tensor>;

// The path of a file that the manifest names, which must be as long as it says. Digests are what `dlops verify` checks.
std::string payload(const std::string& folder, const Json& manifest, const std::string& role) {
  const Json& entry = manifest.at("files").at(role);
  const std::string path = folder + "/" + entry.at("path").text;
  std::ifstream file(path, std::ios::binary | std::ios::ate);
  if (!file) throw BadInput(path + ": missing or not readable");
  if (double(file.tellg()) != entry.at("bytes").number) throw BadInput(path + ": not as long as the manifest says");
  return path;
}

// The samples' tensors of one side, in the order of the signature: "input.0.pixels" is the first input.
Tensors of_signature(const std::map<std::string, torch::Tensor>& samples, const Json& specs, const std::string& side) {
  Tensors found;
  for (size_t place = 0; place < specs.list.size(); ++place) {
    const std::string name = side + "." + std::to_string(place) + "." + specs.list[place].at("name").text;
    auto tensor = samples.find(name);
    if (tensor == samples.end() || tensor->second.dim() == 0) throw BadInput("the samples hold no tensor " + name);
    found.push_back(tensor->second);
  }
  return found;
}

// A module's answer (a tensor, a tuple, a list or a dict by name) in the order of the signature.
Tensors outputs_of(const torch::IValue& answer, const Json& specs) {
  Tensors outputs;
  if (answer.isTensor()) {
    outputs.push_back(answer.toTensor());
  } else if (answer.isGenericDict()) {
    for (const Json& spec : specs.list) outputs.push_back(answer.toGenericDict().at(spec.at("name").text).toTensor());
  } else if (answer.isTuple()) {
    for (const auto& one : answer.toTupleRef().elements()) outputs.push_back(one.toTensor());
  } else {
    outputs = answer.toTensorVector();
  }
  if (outputs.size() != specs.list.size()) throw BadInput("the module gives another number of outputs");
  return outputs;
}

// What the module answers, `size` samples at a time.
Tensors run(torch::jit::Module& module, const Tensors& inputs, const Json& specs, int64_t size) {
  std::vector<Tensors> parts(specs.list.size());
  const int64_t samples = inputs[0].size(0);
  for (int64_t from = 0; from < samples; from += size) {
    std::vector<torch::IValue> batch;
    for (const auto& input : inputs) batch.emplace_back(input.slice(0, from, std::min(from + size, samples)));
    const Tensors outputs = outputs_of(module.forward(batch), specs);
    for (size_t place = 0; place < parts.size(); ++place) parts[place].push_back(outputs[place]);
  }
  Tensors whole;
  for (const auto& part : parts) whole.push_back(torch::cat(part));
  return whole;
}

// Whether `got` keeps the tolerance as `dlops verify` counts it: the absolute error in standard deviations of the
// reference where that is above 1, the relative one of its largest value.
bool agrees(const std::string& what, const torch::Tensor& expected, const torch::Tensor& got, const Json& tolerance) {
  if (got.sizes() != expected.sizes() || got.scalar_type() != expected.scalar_type()) {
    std::cout << what << ": " << got.toString() << got.sizes() << ", the samples hold " << expected.toString()
              << expected.sizes() << "\n";
    return false;
  }
  const auto reference = expected.to(torch::kFloat64), answer = got.to(torch::kFloat64);
  const double error = (answer - reference).abs().max().item<double>();
  const double largest = reference.abs().max().item<double>();
  const double max_abs = error / std::max(1.0, reference.std(/*unbiased=*/false).item<double>());
  const double max_rel = error == 0 ? 0 : error / largest;
  // NaN is within no bound.
  const auto keeps = [](double value, const Json& bound) { return bound.is_null() || value <= bound.number; };
  const bool kept = keeps(max_abs, tolerance.at("max_abs")) && keeps(max_rel, tolerance.at("max_rel"));
  std::cout << what << ": largest error " << max_abs << " absolute, " << max_rel << " relative: "
            << (kept ? "agrees" : "DIFFERS") << "\n";
  return kept;
}

int check(const std::string& folder) {
  const Json manifest = Json::parse(dlops::read_file(folder + "/artifact.json"));
  const Json& variant = manifest.at("variant");
  if (variant.at("format").text != "torchscript") {
    throw BadInput(folder + ": its format is " + variant.at("format").text + ", and LibTorch runs torchscript");
  }
  const Json& tolerance = manifest.at("parity").at("tolerance");
  if (tolerance.at("max_abs").is_null() && tolerance.at("max_rel").is_null()) {
    throw BadInput(folder + ": it records no tolerance that this program checks");
  }
  const Json& signature = manifest.at("signature");
  const auto samples = dlops::read_safetensors(payload(folder, manifest, "samples"));
  const Tensors inputs = of_signature(samples, signature.at("inputs"), "input");
  const Json& specs = signature.at("outputs");
  const Tensors expected = of_signature(samples, specs, "output");
  const int64_t count = inputs.at(0).size(0), most = int64_t(signature.at("dims").at("batch").at("max").number);
  if (count == 0) throw BadInput(folder + ": no samples, so nothing could be checked");

  torch::InferenceMode inference;
  torch::jit::Module module = torch::jit::load(payload(folder, manifest, "model"));
  module.eval();
  std::cout << manifest.at("name").text << "/torchscript-" << variant.at("precision").text << " on the CPU, " << count
            << " samples\n";
  bool all_agree = true;
  std::vector<int64_t> sizes = {1, std::min(count, most)};
  sizes.erase(std::unique(sizes.begin(), sizes.end()), sizes.end());
  for (int64_t size : sizes) {
    const Tensors got = run(module, inputs, specs, size);
    for (size_t place = 0; place < expected.size(); ++place) {
      const std::string what = specs.list[place].at("name").text + " at batch " + std::to_string(size);
      all_agree &= agrees(what, expected[place], got[place], tolerance);
    }
  }
  return all_agree ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) {
    std::cerr << "usage: run_artifact FOLDER, that of a TorchScript artifact\n";
    return 2;
  }
  try {
    return check(argv[1]);
  } catch (const c10::Error& error) {
    // The rest is a stack of LibTorch's own.
    const std::string said = error.what_without_backtrace();
    std::cerr << argv[1] << ": LibTorch cannot load or run it: " << said.substr(0, said.find('\n')) << "\n";
  } catch (const std::exception& error) {
    std::cerr << argv[1] << ": " << error.what() << "\n";
  }
  return 2;
}
