// A bundle of cdl-edge in C++: proves itself on the pictures that the bundle carries, then classifies JPEG files.
//
//     classify BUNDLE [--json | --pixels] IMAGE...
//
// Exit codes: 0 done, 1 the self-test fails, 2 bad input. --json: a line with the logits for each picture.
// --pixels: the bytes that the graph would get, to be compared with `bundle.preprocessing.read` of Python.

#include <cstdlib>
#include <cstring>
#include <iostream>
#include <map>
#include <numeric>

#include <onnxruntime_cxx_api.h>
#include <zlib.h>

#include "picture.hpp"

using nlohmann::json;
namespace fs = std::filesystem;

constexpr double TOLERANCE = 1e-3;  // of logits in fp32, as in runtime/selftest.py

struct Answer {
    std::vector<float> logits, weights;  // (C), (L x K); the latter is empty where no prompts are selected
};

// A graph of the bundle, opened in ONNX Runtime on the CPU.
class Student {
public:
    json manifest;
    Preprocessing preprocessing;

    Student(const fs::path& folder, int threads)
        : manifest(json::parse(read_file(folder / "manifest.json"))), preprocessing(manifest["input"]["preprocessing"]),
          session_(nullptr) {
        Ort::SessionOptions options;
        if (threads) options.SetIntraOpNumThreads(threads);
        const fs::path graph = folder / manifest["graphs"]["student"].get<std::string>();
        session_ = Ort::Session(environment_, graph.c_str(), options);
        images_ = manifest["input"].value("name", "images");
        const auto& shape = manifest["input"]["shape"];
        batch_ = manifest["input"].value("dynamic_batch", false) ? 1 : shape[0].get<std::int64_t>();
        outputs_ = {"logits"};
        if (manifest["outputs"].contains("prompt_weights")) outputs_.push_back("prompt_weights");
    }

    // uint8 (S, S, 3), RGB, not normalised: that is in the graph.
    Answer operator()(const std::uint8_t* pixels) {
        const std::int64_t side = preprocessing.size, bytes = side * side * 3;
        const std::array<std::int64_t, 4> shape{batch_, side, side, 3};
        std::vector<std::uint8_t> feed(std::size_t(batch_ * bytes));
        std::copy_n(pixels, bytes, feed.begin());
        auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
        auto input = Ort::Value::CreateTensor<std::uint8_t>(memory, feed.data(), feed.size(), shape.data(), 4);
        const char* name = images_.c_str();
        auto found = session_.Run(Ort::RunOptions{}, &name, &input, 1, outputs_.data(), outputs_.size());
        const auto first = [&](const Ort::Value& value) {  // the batch's first row
            const auto count = value.GetTensorTypeAndShapeInfo().GetElementCount() / std::size_t(batch_);
            return std::vector<float>(value.GetTensorData<float>(), value.GetTensorData<float>() + count);
        };
        return {first(found[0]), found.size() > 1 ? first(found[1]) : std::vector<float>{}};
    }

    // Entries that a picture selected, see runtime/select.py.
    std::vector<int> prompts(const Answer& answer) const {
        const auto& selection = manifest["selection"];
        const std::string kind = selection["kind"];
        if (kind == "none" || answer.weights.empty()) return {};
        const std::size_t entries = manifest["outputs"]["prompt_weights"].back();
        const std::size_t blocks = answer.weights.size() / entries;
        std::vector<float> scores = answer.weights;
        if (kind == "weighted") {  // of all blocks together
            scores.assign(entries, 0);
            for (std::size_t i = 0; i < answer.weights.size(); i++)
                scores[i % entries] += std::abs(answer.weights[i]) / float(blocks);
        }
        std::vector<int> chosen;
        for (std::size_t begin = 0; begin < scores.size(); begin += entries) {
            std::vector<int> order(entries);
            std::iota(order.begin(), order.end(), 0);
            const float* score = scores.data() + begin;
            std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return score[a] > score[b]; });
            chosen.insert(chosen.end(), order.begin(), order.begin() + selection["k"].get<int>());
        }
        return chosen;
    }

private:
    Ort::Env environment_{ORT_LOGGING_LEVEL_WARNING, "classify"};
    Ort::Session session_;
    std::string images_;
    std::int64_t batch_ = 1;
    std::vector<const char*> outputs_;
};

// The arrays of an .npz file: a zip of .npy files, stored or deflated, in C order.
std::map<std::string, Bytes> read_npz(const fs::path& path) {
    const Bytes file = read_file(path);
    const auto number = [&](std::size_t at, int bytes) {
        if (at + bytes > file.size()) throw std::runtime_error(path.string() + ": truncated");
        std::uint64_t value = 0;
        for (int i = 0; i < bytes; i++) value |= std::uint64_t(file[at + i]) << 8 * i;
        return std::size_t(value);
    };
    std::size_t end = file.size() - std::min<std::size_t>(file.size(), 22);
    while (end && number(end, 4) != 0x06054b50) end--;  // the end of the list of members
    std::map<std::string, Bytes> arrays;
    for (std::size_t i = 0, at = number(end + 16, 4); i < number(end + 10, 2); i++) {
        const std::size_t method = number(at + 10, 2), packed = number(at + 20, 4), size = number(at + 24, 4);
        const std::size_t named = number(at + 28, 2), local = number(at + 42, 4);
        const std::size_t data = local + 30 + number(local + 26, 2) + number(local + 28, 2);
        if (std::max(data + packed, at + 46 + named) > file.size())
            throw std::runtime_error(path.string() + ": truncated");
        const std::string name(file.begin() + at + 46, file.begin() + at + 46 + named);
        Bytes content(size);
        if (method == 0) std::copy_n(file.begin() + data, std::min(size, packed), content.begin());
        else {
            z_stream stream{};
            stream.next_in = const_cast<Bytef*>(file.data() + data), stream.avail_in = uInt(packed);
            stream.next_out = content.data(), stream.avail_out = uInt(size);
            inflateInit2(&stream, -MAX_WBITS);  // no header: a zip has its own
            const int outcome = inflate(&stream, Z_FINISH);
            inflateEnd(&stream);
            if (outcome != Z_STREAM_END) throw std::runtime_error(path.string() + ": " + name + " is damaged");
        }
        // "\x93NUMPY", version, length of the header (2 bytes, from version 2 on 4), header, values.
        const std::size_t header = content.at(6) == 1 ? 10 + content.at(8) + 256 * content.at(9)
                                                      : 12 + content.at(8) + 256 * content.at(9);
        arrays[name.substr(0, name.rfind(".npy"))] = Bytes(content.begin() + header, content.end());
        at += 46 + named + number(at + 30, 2) + number(at + 32, 2);
    }
    return arrays;
}

// Whether the pictures of the self-test give the logits that the trained student gave.
bool proves_itself(Student& student, const fs::path& folder) {
    const auto arrays = read_npz(folder / student.manifest.at("selftest").get<std::string>());
    const Bytes &images = arrays.at("images"), &expected = arrays.at("logits");
    const std::size_t bytes = std::size_t(3) * student.preprocessing.size * student.preprocessing.size;
    const std::size_t classes = student.manifest["classes"].size(), count = images.size() / bytes;
    double largest = 0;
    for (std::size_t i = 0; i < count; i++) {
        const auto logits = student(images.data() + i * bytes).logits;
        for (std::size_t c = 0; c < classes; c++) {
            float wanted;
            std::memcpy(&wanted, expected.data() + 4 * (i * classes + c), 4);
            const double difference = std::abs(double(logits.at(c)) - wanted);
            largest = difference <= largest ? largest : difference;  // NaN counts as a difference
        }
    }
    std::cerr << "self-test: " << count << " pictures, largest difference of a logit " << largest << '\n';
    return count && largest <= TOLERANCE;
}

int main(int count, char** words) try {
    std::vector<std::string> arguments(words + 1, words + count), files;
    bool as_json = false, as_pixels = false;
    int threads = 0;  // as many as ONNX Runtime takes
    for (const auto& word : arguments) {
        if (word == "--json") as_json = true;
        else if (word == "--pixels") as_pixels = true;
        else if (word.rfind("--threads=", 0) == 0) threads = std::max(0, std::atoi(word.c_str() + 10));
        else files.push_back(word);
    }
    setenv("ORT_DISABLE_TELEMETRY", "1", 0);  // the engine would tell its makers of every model
    if (files.empty()) throw std::runtime_error("usage: classify BUNDLE [--json | --pixels] [--threads=N] IMAGE...");
    fs::path folder = files.front();
    if (fs::is_symlink(folder / "current")) folder /= "current";  // packs were installed: the version that runs
    folder = fs::canonical(folder);
    Student student(folder, threads);
    if (!proves_itself(student, folder)) {
        std::cerr << "failed: this machine does not compute what the student computed\n";
        return 1;
    }
    for (auto file = files.begin() + 1; file != files.end(); ++file) {
        Image picture{0, 0};
        try {
            picture = student.preprocessing.read(*file);
        } catch (const std::exception& error) {
            throw std::runtime_error(*file + ": " + error.what());
        }
        if (as_pixels) {
            std::cout.write(reinterpret_cast<const char*>(picture.rgb.data()), std::streamsize(picture.rgb.size()));
            continue;
        }
        const Answer answer = student(picture.rgb.data());
        const auto best = std::max_element(answer.logits.begin(), answer.logits.end());
        double sum = 0;
        for (float logit : answer.logits) sum += std::exp(double(logit) - *best);
        const auto index = std::size_t(best - answer.logits.begin());
        const std::string label = student.manifest["classes"][index];
        const json prompts = student.prompts(answer);
        if (as_json)
            std::cout << json{{"image", *file}, {"label", label}, {"index", index}, {"probability", 1 / sum},
                              {"logits", answer.logits}, {"prompts", prompts}} << '\n';
        else
            std::cout << *file << ": " << label << " (" << std::round(1000 / sum) / 10 << " %)  prompts " << prompts
                      << '\n';
    }
    return 0;
} catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << '\n';
    return 2;
}
