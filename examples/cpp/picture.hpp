// From a JPEG file to the pixels that the student was trained on: decoder rule 2 of images.py, bit for bit.
//
// The arithmetic is that of Pillow (libjpeg's accurate DCT, reduce, resample), which training used.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <csetjmp>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>
#include <vector>

#include <jpeglib.h>
#include <jerror.h>

using Bytes = std::vector<std::uint8_t>;
using Box = std::array<double, 4>;  // left, top, right, bottom, in pixels

struct Image {
    int width, height;
    Bytes rgb = Bytes(std::size_t(3) * width * height);
    std::uint8_t* at(int x, int y) { return rgb.data() + 3 * (std::size_t(y) * width + x); }
    const std::uint8_t* at(int x, int y) const { return rgb.data() + 3 * (std::size_t(y) * width + x); }
};

inline Bytes read_file(const std::filesystem::path& path) {
    std::ifstream stream(path, std::ios::binary);
    if (!stream || std::filesystem::is_directory(path)) throw std::runtime_error(path.string() + ": cannot be read");
    return Bytes(std::istreambuf_iterator<char>(stream), {});
}

// How pictures become the input of this bundle: "input" / "preprocessing" of its manifest.
struct Preprocessing {
    int size, resize;
    std::string interpolation, rule;

    explicit Preprocessing(const nlohmann::json& fields)
        : size(fields.at("size")), resize(fields.at("resize")), interpolation(fields.at("interpolation")),
          rule(fields.value("resize_rule", "cut")) {
        if (fields.value("decoder", 1) != 2) throw std::runtime_error("a bundle of decoder rule 1: export it again");
    }

    // What of a picture is kept, and the (width, height) that it is scaled to.
    Box geometry(int width, int height, int (&target)[2]) const {
        target[0] = target[1] = size;
        if (rule == "squash") return {0, 0, double(width), double(height)};
        if (rule == "pad") {
            const double longer = std::max(width, height);  // nearbyint: half to even, as Python rounds
            target[0] = std::max(1, int(std::nearbyint(double(width) * size / longer)));
            target[1] = std::max(1, int(std::nearbyint(double(height) * size / longer)));
            return {0, 0, double(width), double(height)};
        }
        const double side = double(std::min(width, height)) * size / resize;
        double left = (width - side) / 2, top = (height - side) / 2;
        if (side == size) left = std::floor(left), top = std::floor(top);  // nothing is scaled: whole pixels are cut
        return {left, top, left + side, top + side};
    }

    Image read(const std::filesystem::path& path) const;
};

// -- libjpeg ---------------------------------------------------------------------------------------------------------

struct JpegErrors : jpeg_error_mgr {
    std::jmp_buf back;
    char message[JMSG_LENGTH_MAX];
    static void leave(j_common_ptr info) {
        auto* self = static_cast<JpegErrors*>(info->err);
        self->format_message(info, self->message);
        std::longjmp(self->back, 1);
    }
    static void warn(j_common_ptr info, int level) {
        // Pillow refuses a truncated file, and no other one that libjpeg reads.
        if (level < 0 && info->err->msg_code == JWRN_JPEG_EOF) leave(info);
    }
};

// EXIF orientation, 1 to 8; what XMP says where EXIF says nothing.
inline int orientation(const jpeg_decompress_struct& info) {
    int found = 0;
    for (auto* marker = info.marker_list; marker; marker = marker->next) {
        const auto* data = marker->data;
        const std::size_t length = marker->data_length;
        if (length > 14 && std::equal(data, data + 6, "Exif\0")) {
            const auto* tiff = data + 6;
            auto number = [&](std::size_t at, int bytes) {
                std::uint32_t value = 0;
                for (int i = 0; i < bytes && at + bytes <= length - 6; i++)
                    value |= std::uint32_t(tiff[at + i]) << 8 * (tiff[0] == 'I' ? i : bytes - 1 - i);
                return value;
            };
            const std::size_t first = number(4, 4);
            for (std::size_t i = 0, count = number(first, 2); i < count && !found; i++)
                if (number(first + 2 + 12 * i, 2) == 0x0112) found = int(number(first + 10 + 12 * i, 2));
        } else if (const std::string text(data, data + length); !found && !text.rfind("http://ns.adobe.com/xap", 0)) {
            const auto digit = text.find_first_of("123456789", text.find("tiff:Orientation"));
            if (digit != std::string::npos) found = text[digit] - '0';
        }
    }
    return found;
}

// Decode at 1 / scale, which `choose` says once the header is read. Grey becomes RGB; CMYK is refused.
// The results are the caller's: a longjmp passes by no destructor.
template <typename Choose>
void decode(const Bytes& file, Choose choose, int& turned, Image& image) {
    jpeg_decompress_struct info;
    JpegErrors errors;
    info.err = jpeg_std_error(&errors);
    errors.error_exit = JpegErrors::leave;
    errors.emit_message = JpegErrors::warn;
    if (setjmp(errors.back)) {
        jpeg_destroy_decompress(&info);
        throw std::runtime_error(errors.message);
    }
    jpeg_create_decompress(&info);
    jpeg_mem_src(&info, file.data(), file.size());
    jpeg_save_markers(&info, JPEG_APP0 + 1, 0xFFFF);
    jpeg_read_header(&info, TRUE);
    turned = orientation(info);
    info.scale_num = 1;
    info.scale_denom = choose(int(info.image_width), int(info.image_height));
    info.out_color_space = JCS_RGB;
    jpeg_start_decompress(&info);
    image = Image{int(info.output_width), int(info.output_height)};
    while (info.output_scanline < info.output_height) {
        JSAMPROW row = image.at(0, int(info.output_scanline));
        jpeg_read_scanlines(&info, &row, 1);
    }
    jpeg_finish_decompress(&info);
    jpeg_destroy_decompress(&info);
}

// -- Pillow ----------------------------------------------------------------------------------------------------------

// The pixels in a box, blocks of `across` x `down` averaged into one (Image.reduce).
inline Image reduced(const Image& image, const std::array<int, 4>& box, int across, int down) {
    Image result{(box[2] - box[0] + across - 1) / across, (box[3] - box[1] + down - 1) / down};
    for (int y = 0; y < result.height; y++)
        for (int x = 0; x < result.width; x++) {
            const int left = box[0] + x * across, right = std::min(left + across, box[2]);
            const int top = box[1] + y * down, bottom = std::min(top + down, box[3]);
            const std::uint32_t count = std::uint32_t(right - left) * std::uint32_t(bottom - top);
            const std::uint32_t share = (1U << 24) / count;  // fixed point, 24 bits
            for (int c = 0; c < 3; c++) {
                std::uint32_t sum = count / 2;
                for (int v = top; v < bottom; v++)
                    for (int u = left; u < right; u++) sum += image.at(u, v)[c];
                result.at(x, y)[c] = count == 1 ? image.at(left, top)[c] : std::uint8_t((sum * share) >> 24);
            }
        }
    return result;
}

// Along one axis: for each of `size` results the first pixel and the weights (fixed point, 22 bits) of its sum.
struct Weights {
    std::vector<int> first;
    std::vector<std::vector<int>> of;

    Weights(int length, float begin, float end, int size, bool cubic) {
        const double scale = double(end - begin) / size, wide = std::max(scale, 1.0), support = (cubic ? 2 : 1) * wide;
        for (int i = 0; i < size; i++) {
            const double centre = begin + (i + 0.5) * scale;
            const int low = std::max(0, int(centre - support + 0.5));
            const int high = std::min(length, int(centre + support + 0.5));
            std::vector<double> exact;
            double sum = 0;
            for (int j = low; j < high; j++) {
                const double x = std::abs((j - centre + 0.5) * (1 / wide)), a = -0.5;
                if (!cubic) exact.push_back(x < 1 ? 1 - x : 0);
                else if (x < 1) exact.push_back(((a + 2) * x - (a + 3)) * x * x + 1);
                else exact.push_back(x < 2 ? (((x - 5) * x + 8) * x - 4) * a : 0);
                sum += exact.back();
            }
            first.push_back(low);
            of.emplace_back();
            for (double value : exact) {
                value = sum != 0 ? value / sum : value;
                of.back().push_back(int((value < 0 ? -0.5 : 0.5) + value * (1 << 22)));
            }
        }
    }
};

// Image.resize(target, interpolation, box).
inline Image resized(const Image& image, const int (&target)[2], const std::string& interpolation, const Box& exact) {
    const std::array<float, 4> box{float(exact[0]), float(exact[1]), float(exact[2]), float(exact[3])};
    Image result{target[0], target[1]};
    if (interpolation == "nearest") {
        const double across = double(box[2] - box[0]) / target[0], down = double(box[3] - box[1]) / target[1];
        std::vector<int> columns;
        double u = box[0] + across * 0.5, v = box[1] + down * 0.5;
        for (int x = 0; x < target[0]; x++, u += across) columns.push_back(std::min(int(u), image.width - 1));
        for (int y = 0; y < target[1]; y++, v += down)
            for (int x = 0; x < target[0]; x++)
                std::copy_n(image.at(columns[x], std::min(int(v), image.height - 1)), 3, result.at(x, y));
        return result;
    }
    const auto pass = [&](const Image& from, Image& to, bool sideways, float begin, float end) {
        const int length = sideways ? from.width : from.height, size = sideways ? to.width : to.height;
        if (length == size && begin == 0 && end == float(size)) return void(to.rgb = from.rgb);
        const Weights weights(length, begin, end, size, interpolation == "bicubic");
        for (int y = 0; y < to.height; y++)
            for (int x = 0; x < to.width; x++) {
                const int i = sideways ? x : y, first = weights.first[i];
                int sum[3] = {1 << 21, 1 << 21, 1 << 21};
                for (std::size_t j = 0; j < weights.of[i].size(); j++) {
                    const auto* pixel = sideways ? from.at(first + int(j), y) : from.at(x, first + int(j));
                    for (int c = 0; c < 3; c++) sum[c] += pixel[c] * weights.of[i][j];
                }
                for (int c = 0; c < 3; c++) to.at(x, y)[c] = std::uint8_t(std::clamp(sum[c] >> 22, 0, 255));
            }
    };
    Image middle{target[0], image.height};
    pass(image, middle, true, box[0], box[2]);
    pass(middle, result, false, box[1], box[3]);
    return result;
}

// As an EXIF orientation wants it, in the middle of a grey square.
inline Image turned_square(const Image& image, int turn, int size) {
    Image square{size, size};
    std::fill(square.rgb.begin(), square.rgb.end(), std::uint8_t(128));
    const bool swapped = turn >= 5 && turn <= 8;
    const bool flip_x = turn == 2 || turn == 3 || turn == 7 || turn == 8;
    const bool flip_y = turn == 3 || turn == 4 || turn == 6 || turn == 7;
    const int width = swapped ? image.height : image.width, height = swapped ? image.width : image.height;
    for (int y = 0; y < height; y++)
        for (int x = 0; x < width; x++) {
            const int u = swapped ? y : x, v = swapped ? x : y;
            const auto* from = image.at(flip_x ? image.width - 1 - u : u, flip_y ? image.height - 1 - v : v);
            std::copy_n(from, 3, square.at(x + (size - width) / 2, y + (size - height) / 2));
        }
    return square;
}

inline Image Preprocessing::read(const std::filesystem::path& path) const {
    int target[2], turn = 1, scale = 1;
    Box region;
    Image image{0, 0};
    // The smallest of the scales that is still at least twice the target, on both sides.
    const auto choose = [&](int width, int height) {
        region = geometry(width, height, target);
        const double spare = std::min((region[2] - region[0]) / target[0], (region[3] - region[1]) / target[1]) / 2;
        for (int candidate : {2, 4, 8})
            if (candidate <= spare) scale = candidate;
        return scale;
    };
    decode(read_file(path), choose, turn, image);
    for (double& value : region) {  // Python's round(value / scale, 6)
        char text[64];
        std::snprintf(text, sizeof text, "%.6f", value / scale);
        value = std::strtod(text, nullptr);
    }
    const auto [left, top, right, bottom] = region;
    const std::array<int, 4> box{int(left), int(top), int(std::ceil(right)), int(std::ceil(bottom))};
    const int across = std::max(1, int((right - left) / (2 * target[0])));
    const int down = std::max(1, int((bottom - top) / (2 * target[1])));
    const Box inside{(left - box[0]) / across, (top - box[1]) / down, (right - box[0]) / across,
                     (bottom - box[1]) / down};
    const Image small = reduced(image, box, across, down);
    return turned_square(resized(small, target, interpolation, inside), turn, size);
}
