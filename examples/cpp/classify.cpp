// Classify JPEGs with chain.onnx: ONNX Runtime's C++ API, no Python. A line of JSON for each, as of `mge-run --json`.
#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <cctype>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <iostream>
#include <nlohmann/json.hpp>
#include <numeric>
#include <stdexcept>

#include "frame.h"

namespace {

using json = nlohmann::ordered_json;  // keys stay in the order they are written
using mge::Box;

constexpr int kTop = 5;         // classes that are printed
constexpr int kLargest = 4096;  // pixels, the side of a frame
constexpr const char* kFrame = "frame";

double rounded(double value, int digits) {
  const double scale = std::pow(10, digits);
  return std::round(value * scale) / scale;
}

// A chain and what its metadata says of it. Normalization and temperature need no code: they are in the graph.
class Chain {
 public:
  explicit Chain(const std::string& path) : session_(env_, path.c_str(), options()) {
    classes_ = metadata("class_names").get<std::vector<std::string>>();
    resize_ = metadata("resize");
    size_ = metadata("size");
    const auto crops = metadata("crops");
    sides_ = crops.at("sizes").get<std::vector<int>>();
    cut_from_frame_ = crops.at("frame") > 0;
    const bool sized = size_ >= 1 && size_ <= kLargest && resize_ >= size_ && resize_ <= 4 * size_;
    const auto larger = [](int side) { return side > 1; };  // else no crop spans it
    if (!sized || sides_.empty() || !std::all_of(sides_.begin(), sides_.end(), larger) || classes_.empty())
      throw std::runtime_error("its metadata names no classes or impossible sizes: export it again");
    outputs_ = {"probabilities"};
    for (std::size_t k = 1; k < sides_.size(); ++k) outputs_.push_back("box_" + std::to_string(k));
    if (sides_.size() > 1) outputs_.push_back("gate");
  }

  json predict(const std::string& path) {
    const auto start = std::chrono::steady_clock::now();
    const mge::Image image = mge::read_jpeg(path);
    mge::Frame frame = mge::to_frame(image, resize_, size_);
    const auto tensors = run(frame.image.pixels);
    const std::chrono::duration<double, std::milli> elapsed = std::chrono::steady_clock::now() - start;

    const auto probabilities = values(tensors.front());
    const auto finite = [](float value) { return std::isfinite(value); };
    if (probabilities.size() != classes_.size() || !std::all_of(probabilities.begin(), probabilities.end(), finite))
      throw std::runtime_error("the chain's probabilities are not one finite number for each class: export it again");
    std::vector<int> likeliest(classes_.size());
    std::iota(likeliest.begin(), likeliest.end(), 0);
    std::stable_sort(likeliest.begin(), likeliest.end(),
                     [&](int a, int b) { return probabilities[a] > probabilities[b]; });
    likeliest.resize(std::min<std::size_t>(kTop, likeliest.size()));

    json top = json::array();
    for (int k : likeliest)
      top.push_back({{"class_name", classes_[k]}, {"probability", rounded(probabilities[k], 6)}});
    json result{{"image", path}, {"class_name", top[0]["class_name"]}, {"probability", top[0]["probability"]}};
    result["top"] = top;
    result["boxes"] = seen(tensors, frame.shown);
    if (sides_.size() > 1)
      for (float share : values(tensors.back())) result["gate"].push_back(rounded(share, 6));
    result["width"] = image.width;
    result["height"] = image.height;
    result["ms"] = rounded(elapsed.count(), 3);
    return result;
  }

 private:
  static Ort::SessionOptions options() {
    Ort::SessionOptions options;
    options.SetLogSeverityLevel(ORT_LOGGING_LEVEL_FATAL);  // what fails is thrown
    return options;
  }

  static std::vector<float> values(const Ort::Value& tensor) {
    const auto info = tensor.GetTensorTypeAndShapeInfo();
    if (info.GetElementType() != ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT)
      throw std::runtime_error("an output of the chain is not of type float32: export it again");
    const auto* data = tensor.GetTensorData<float>();
    return {data, data + info.GetElementCount()};
  }

  json metadata(const char* key) {
    Ort::AllocatorWithDefaultOptions allocator;
    const auto text = session_.GetModelMetadata().LookupCustomMetadataMapAllocated(key, allocator);
    if (!text) throw std::runtime_error(std::string("it has no metadata ") + key + "; expected mge's chain.onnx");
    return json::parse(text.get());
  }

  std::vector<Ort::Value> run(std::vector<std::uint8_t>& pixels) {
    const std::array<std::int64_t, 4> shape{1, size_, size_, 3};
    const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
    const auto input = Ort::Value::CreateTensor(memory, pixels.data(), pixels.size(), shape.data(), shape.size());
    std::vector<const char*> names;
    for (const auto& name : outputs_) names.push_back(name.c_str());
    return session_.Run({}, &kFrame, &input, 1, names.data(), names.size());
  }

  // What each expert saw, in pixels of the source image; `compose_boxes` of mge_runtime/preprocess.py explains the
  // formula. Tensor k is what expert k + 1 sees, in pixels of expert k's image, or, where crops are cut from the frame,
  // in pixels of that.
  std::vector<Box> seen(const std::vector<Ort::Value>& tensors, const Box& shown) const {
    std::vector<Box> boxes{{0, 0, double(size_), double(size_)}};
    for (std::size_t k = 1; k < sides_.size(); ++k) {
      const auto edges = values(tensors[k]);
      if (edges.size() != 4) throw std::runtime_error("a box of the chain has no four edges: export it again");
      boxes.push_back({edges[0], edges[1], edges[2], edges[3]});
    }
    std::vector<Box> all;
    for (std::size_t k = 0; k < boxes.size(); ++k) {
      Box edges = boxes[k];
      for (std::size_t outer = k; outer-- > 1 && !cut_from_frame_;)
        edges = uncropped(edges, boxes[outer], sides_[outer]);
      for (std::size_t e = 0; e < edges.size(); ++e) {
        const double low = shown[e % 2], high = shown[e % 2 + 2];  // x0 and x1, or y0 and y1
        edges[e] = rounded(low + edges[e] * (high - low) / size_, 2);
      }
      all.push_back(edges);
    }
    return all;
  }

  // Edges in pixels of an image of `side` pixels, in pixels of the image that `box` cut it from.
  static Box uncropped(const Box& edges, const Box& box, int side) {
    Box outer;
    for (std::size_t e = 0; e < edges.size(); ++e) {
      const double low = box[e % 2], high = box[e % 2 + 2];
      const double edge = low + 0.5 + (edges[e] - 0.5) * (high - low - 1) / (side - 1);
      outer[e] = high - low <= 1 ? box[e] : std::clamp(edge, low, high);
    }
    return outer;
  }

  Ort::Env env_{ORT_LOGGING_LEVEL_FATAL, "mge"};
  Ort::Session session_;
  std::vector<std::string> classes_, outputs_;
  int resize_ = 0, size_ = 0;
  std::vector<int> sides_;  // pixels, of each expert's image
  bool cut_from_frame_ = false;
};

void complain(std::string message) {
  std::replace_if(message.begin(), message.end(), [](unsigned char c) { return std::iscntrl(c); }, ' ');
  std::cerr << "error: " << message << '\n';
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) {
    complain("expected a chain and images: classify chain.onnx IMAGE.jpg ...");
    return 2;
  }
  setenv("ORT_DISABLE_TELEMETRY", "1", 0);  // before its first use: from 1.29 on it sends telemetry by default
  try {
    Chain chain(argv[1]);
    int code = 0;
    for (int k = 2; k < argc; ++k) {
      try {
        std::cout << chain.predict(argv[k]).dump(-1, ' ', false, json::error_handler_t::replace) << std::endl;
      } catch (const std::exception& error) {
        complain(error.what());
        code = 1;
      }
    }
    if (!std::cout) {
      complain("cannot write the predictions; expected a standard output with room, check the disk");
      code = 1;
    }
    return code;
  } catch (const std::exception& error) {
    complain("cannot open " + std::string(argv[1]) + ": " + error.what());
    return 1;
  }
}
