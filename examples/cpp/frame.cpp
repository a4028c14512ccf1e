#include "frame.h"

#include <turbojpeg.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <memory>
#include <stdexcept>
#include <string_view>

namespace mge {
namespace {

using Bytes = std::vector<std::uint8_t>;

constexpr std::uintmax_t kMostBytes = 100'000'000;  // of a file
constexpr std::int64_t kMostPixels = 65'000'000;    // of an image, 195 MB
constexpr int kBits = 22;                           // of a weight's fraction, as in Pillow

Bytes read_file(const std::string& path) {
  std::error_code error;
  if (!std::filesystem::is_regular_file(path, error))
    throw std::runtime_error("no image at " + path + ": it is missing or no regular file; check the name");
  const auto size = std::filesystem::file_size(path, error);
  if (error || size > kMostBytes)
    throw std::runtime_error("will not read " + path + ": it has more than 100 MB; scale it down first");
  Bytes bytes(size);
  std::ifstream file(path, std::ios::binary);
  if (!file.read(reinterpret_cast<char*>(bytes.data()), static_cast<std::streamsize>(size)))
    throw std::runtime_error("cannot read " + path + "; expected a readable file, check its permissions");
  return bytes;
}

// A number of `count` bytes; 0 where there are none left, since broken metadata never stops an image.
std::uint32_t number(std::string_view data, std::size_t at, int count, bool big_endian) {
  if (at > data.size() || data.size() - at < std::size_t(count)) return 0;
  std::uint32_t value = 0;
  for (int k = 0; k < count; ++k)
    value = value << 8 | static_cast<std::uint8_t>(data[at + (big_endian ? k : count - 1 - k)]);
  return value;
}

// The orientation in a JPEG's EXIF segment (EXIF 2.32, 4.6.4 A), 1 to 8; 1, upright, where there is none.
int orientation(const Bytes& file) {
  const std::string_view data(reinterpret_cast<const char*>(file.data()), file.size());
  constexpr std::string_view kExif("Exif\0\0", 6);
  for (std::size_t at = 2; number(data, at, 1, true) == 0xFF;) {
    const auto marker = number(data, at + 1, 1, true), length = number(data, at + 2, 2, true);
    if (length < 2 || marker == 0xDA) break;  // the pixels follow
    const auto segment = data.substr(at + 4 < data.size() ? at + 4 : data.size(), length - 2);
    at += 2 + length;
    if (marker != 0xE1 || segment.substr(0, kExif.size()) != kExif) continue;
    const auto tiff = segment.substr(kExif.size());
    const bool big = number(tiff, 0, 1, true) == 'M';
    const std::size_t directory = number(tiff, 4, 4, big), entries = number(tiff, directory, 2, big);
    for (std::size_t k = 0; k < entries; ++k) {
      const std::size_t entry = directory + 2 + 12 * k;
      if (number(tiff, entry, 2, big) != 0x0112) continue;
      const auto value = number(tiff, entry + 8, 2, big);
      return 1 <= value && value <= 8 ? static_cast<int>(value) : 1;
    }
    break;  // the first EXIF counts, as in Pillow; a file can have millions
  }
  return 1;
}

Image upright(Image image, int orientation) {
  if (orientation == 1) return image;
  const bool transposed = orientation >= 5;
  const bool mirrored = orientation == 2 || orientation == 3 || orientation == 7 || orientation == 8;
  const bool upside_down = orientation == 3 || orientation == 4 || orientation == 6 || orientation == 7;
  Image turned{image.width, image.height, Bytes(image.pixels.size())};
  if (transposed) std::swap(turned.width, turned.height);
  auto* out = turned.pixels.data();
  for (int y = 0; y < turned.height; ++y) {
    for (int x = 0; x < turned.width; ++x, out += 3) {
      int column = transposed ? y : x, row = transposed ? x : y;
      if (mirrored) column = image.width - 1 - column;
      if (upside_down) row = image.height - 1 - row;
      std::copy_n(&image.pixels[3 * (std::size_t(row) * image.width + column)], 3, out);
    }
  }
  return turned;
}

// What one resized pixel reads: as many pixels as there are weights, from `first` on.
struct Taps {
  int first;
  std::vector<int> weights;  // in units of 2^-22, together 1
};

// The taps of `count` pixels from `start` on, where `from` pixels are resized to `to`: a triangle around each pixel's
// center, as wide as two pixels of the coarser side. Arithmetic and rounding are Pillow's.
std::vector<Taps> bilinear(int from, int to, int start, int count) {
  const double scale = double(from) / to, reach = std::max(scale, 1.0), narrow = 1.0 / reach;
  std::vector<Taps> all;
  for (int i = start; i < start + count; ++i) {
    const double center = (i + 0.5) * scale;
    const int first = std::max(0, int(center - reach + 0.5)), end = std::min(from, int(center + reach + 0.5));
    std::vector<double> triangle;
    double sum = 0;
    for (int x = first; x < end; ++x) {
      triangle.push_back(std::max(0.0, 1.0 - std::abs((x - center + 0.5) * narrow)));
      sum += triangle.back();
    }
    Taps taps{first, {}};
    for (double weight : triangle) taps.weights.push_back(int(0.5 + weight / sum * (1 << kBits)));
    all.push_back(std::move(taps));
  }
  return all;
}

// Resample every row and transpose the result: done twice, both directions are resampled and it is upright again.
Image resample(const Image& image, const std::vector<Taps>& taps) {
  const int width = static_cast<int>(taps.size());
  Image out{image.height, width, Bytes(std::size_t(3) * width * image.height)};
  for (int y = 0; y < image.height; ++y) {
    const auto* row = &image.pixels[std::size_t(3) * y * image.width];
    for (int x = 0; x < width; ++x) {
      int sums[3] = {1 << (kBits - 1), 1 << (kBits - 1), 1 << (kBits - 1)};
      const auto* in = row + 3 * taps[x].first;
      for (int weight : taps[x].weights)
        for (int& sum : sums) sum += weight * *in++;
      auto* pixel = &out.pixels[3 * (std::size_t(x) * image.height + y)];
      for (int sum : sums) *pixel++ = static_cast<std::uint8_t>(std::min(sum >> kBits, 255));
    }
  }
  return out;
}

}  // namespace

Image read_jpeg(const std::string& path) {
  const Bytes file = read_file(path);
  const std::unique_ptr<void, decltype(&tjDestroy)> decoder(tjInitDecompress(), tjDestroy);
  const auto refuse = [&](const std::string& reason) {
    throw std::runtime_error("cannot decode " + path + ": " + reason + "; expected a whole JPEG of RGB or gray");
  };
  Image image;
  int subsampling = 0, colors = 0;
  if (tjDecompressHeader3(decoder.get(), file.data(), file.size(), &image.width, &image.height, &subsampling, &colors))
    refuse(tjGetErrorStr2(decoder.get()));
  if (std::int64_t(image.width) * image.height > kMostPixels)
    refuse("it is " + std::to_string(image.width) + " x " + std::to_string(image.height) + " pixels, over 65 million");
  image.pixels.resize(std::size_t(3) * image.width * image.height);
  // A file of a few kilobytes can have thousands of scans, each as much work as a whole image.
  constexpr int kFlags = TJFLAG_ACCURATEDCT | TJFLAG_LIMITSCANS;
  if (tjDecompress2(decoder.get(), file.data(), file.size(), image.pixels.data(), image.width, 0, image.height,
                    TJPF_RGB, kFlags))
    refuse(tjGetErrorStr2(decoder.get()));
  return upright(std::move(image), orientation(file));
}

Frame to_frame(const Image& image, int resize, int size) {
  const auto longer = [&](int side, int shorter) { return int(std::int64_t(resize) * side / shorter); };
  const bool tall = image.width <= image.height;
  const int width = tall ? resize : longer(image.width, image.height);
  const int height = tall ? longer(image.height, image.width) : resize;
  const auto corner = [&](int side) { return (side - size) / 2 + ((side - size) % 4 == 3); };  // half to even
  const int left = corner(width), top = corner(height);
  const Image columns = resample(image, bilinear(image.width, width, left, size));
  const double x = double(image.width) / width, y = double(image.height) / height;  // source pixels for a resized one
  return {resample(columns, bilinear(image.height, height, top, size)),
          {left * x, top * y, (left + size) * x, (top + size) * y}};
}

}  // namespace mge
