// The way from a JPEG file to the chain's input, as the Python runtime goes it (mge_runtime/preprocess.py).
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

namespace mge {

using Box = std::array<double, 4>;  // x0, y0, x1, y1; pixel j covers [j, j + 1]

struct Image {
  int width = 0, height = 0;          // pixels
  std::vector<std::uint8_t> pixels;  // RGB, row by row
};

struct Frame {
  Image image;  // size x size
  Box shown;    // the rectangle of the source image that it shows, in pixels of that
};

// Decode a JPEG to upright pixels. Throws std::runtime_error with one line where the file is missing, no regular file,
// no JPEG, damaged, cut short, or larger than 100 MB or 65 megapixels.
Image read_jpeg(const std::string& path);

// Resize the shorter side to `resize` (bilinear, antialiased) and crop the center, `size` x `size`.
Frame to_frame(const Image& image, int resize, int size);

}  // namespace mge
