// Holds one .pte and answers commands: the native counterpart of targets/_worker.py, with no Python or PyTorch on the device.
//
//   gcvit-edge-runner FILE.pte THREADS [--cpus CPU,CPU...] [--etdump FILE]
//
// The protocol is that of targets/_process.py. --cpus: those that it is pinned to. --etdump: every `time` writes the profile of
// its inferences there, as ETDump; profiling itself takes some time. Answers go to what was standard output at the start,
// whatever the runtime prints to standard error.
//
// Built on a new system, it must start on an older one. So integers are read by std::from_chars (std::stoi and scanf need glibc 2.38
// where there is one), and there is no <iostream> (which needs the libstdc++ of GCC 13 where it is compiled by that).

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <fstream>
#include <functional>
#include <memory>
#include <numeric>
#include <sstream>
#include <stdexcept>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include <executorch/devtools/etdump/etdump_flatcc.h>
#include <executorch/extension/module/module.h>
#include <executorch/extension/tensor/tensor.h>

#include "energy.h"

// The wheel exports the thread pool but ships no header of it: this is the part of extension/threadpool/threadpool.h that is used.
namespace executorch::extension::threadpool {
class ThreadPool {
 public:
  bool _unsafe_reset_threadpool(uint32_t threads);
};
ThreadPool* get_threadpool();
}  // namespace executorch::extension::threadpool

namespace {

using executorch::etdump::ETDumpGen;
using executorch::extension::Module;
using executorch::runtime::Error;
using Clock = std::chrono::steady_clock;

struct Arguments {
  std::string file;
  unsigned threads;
  std::vector<int> cpus;
  std::string etdump;
};

[[noreturn]] void fail(const std::string& message) { throw std::runtime_error(message); }

void check(Error error, const std::string& what) {
  if (error != Error::Ok) fail(what + ": ExecuTorch says " + executorch::runtime::to_string(error));
}

std::vector<std::string> split(const std::string& text, char separator) {
  std::vector<std::string> parts;
  std::istringstream stream(text);
  for (std::string part; std::getline(stream, part, separator);) parts.push_back(part);
  return parts;
}

int parse_count(const std::string& text, const std::string& what) {
  int value = -1;
  const char* end = text.data() + text.size();
  const auto [rest, error] = std::from_chars(text.data(), end, value);
  if (error != std::errc() || rest != end || value < 0) fail(what + " must be a whole number from 0, got '" + text + "'");
  return value;
}

Arguments parse_arguments(int count, char** words) {
  if (count < 3 || count % 2 == 0) fail("usage: gcvit-edge-runner FILE.pte THREADS [--cpus CPU,CPU...] [--etdump FILE]");
  Arguments arguments{words[1], static_cast<unsigned>(parse_count(words[2], "THREADS")), {}, ""};
  if (arguments.threads == 0) fail("THREADS must be at least 1, got 0");
  for (int i = 3; i < count; i += 2) {
    const std::string option = words[i];
    if (option == "--cpus") {
      for (const auto& cpu : split(words[i + 1], ',')) arguments.cpus.push_back(parse_count(cpu, "--cpus"));
    } else if (option == "--etdump") {
      arguments.etdump = words[i + 1];
    } else {
      fail("unknown option '" + option + "'; known: --cpus, --etdump");
    }
  }
  return arguments;
}

// Pins to `cpus`, or not at all if there are none; returns the CPUs that are left then.
cpu_set_t pin(const std::vector<int>& cpus) {
  cpu_set_t all, set;
  CPU_ZERO(&all);
  CPU_ZERO(&set);
  sched_getaffinity(0, sizeof(all), &all);
  for (int cpu : cpus) CPU_SET(cpu, &set);
  if (!cpus.empty() && sched_setaffinity(0, sizeof(set), &set) != 0) fail("cannot pin to these CPUs; give some that this device has");
  for (int cpu : cpus) CPU_CLR(cpu, &all);
  return all;
}

// Highest resident memory so far, in MB (10^6 bytes): VmHWM, because ru_maxrss is inherited from the process that started this one.
double peak_rss_mb() {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);) {
    if (line.rfind("VmHWM:", 0) == 0) return std::stod(line.substr(6)) * 1024 / 1e6;
  }
  fail("/proc/self/status has no VmHWM");
}

double milliseconds_since(Clock::time_point start) {
  return std::chrono::duration<double, std::milli>(Clock::now() - start).count();
}

// The text without what JSON would take for more than text.
std::string plain(std::string text) {
  const auto special = [](unsigned char c) { return c < ' ' || c == '"' || c == '\\'; };
  text.erase(std::remove_if(text.begin(), text.end(), special), text.end());
  return text;
}

// The next line of standard input; false at its end.
bool next_line(std::string& line) {
  line.clear();
  int c = std::getchar();
  if (c == EOF) return false;
  for (; c != EOF && c != '\n'; c = std::getchar()) line.push_back(static_cast<char>(c));
  return true;
}

std::vector<float> read_floats(std::ifstream& file, const std::string& path, size_t count) {
  std::vector<float> values(count);
  if (!file.read(reinterpret_cast<char*>(values.data()), static_cast<std::streamsize>(count * sizeof(float)))) {
    fail(path + " has fewer than " + std::to_string(count) + " float32 values");
  }
  return values;
}

// A program with its method `forward` loaded: one float32 input, one float32 output.
class Network {
 public:
  Network(const std::string& path, std::unique_ptr<ETDumpGen> tracer) : module_(path, Module::LoadMode::Mmap, std::move(tracer)) {
    check(module_.load_forward(), "cannot load " + path);
  }

  // Logits of one image of `shape`; they are valid until the next call.
  std::pair<const float*, size_t> run(float* image, const std::vector<executorch::aten::SizesType>& shape) {
    auto outputs = module_.forward(executorch::extension::from_blob(image, shape));
    check(outputs.error(), "cannot run");
    if (outputs->size() != 1 || !outputs->at(0).isTensor()) fail("the program must give one tensor");
    const auto tensor = outputs->at(0).toTensor();
    if (tensor.scalar_type() != executorch::aten::ScalarType::Float) fail("the program must give float32");
    return {tensor.const_data_ptr<float>(), static_cast<size_t>(tensor.numel())};
  }

 private:
  Module module_;
};

class Server {
 public:
  // spare: CPUs beside those that are timed
  Server(const Arguments& arguments, FILE* answers, const cpu_set_t& spare) : answers_(answers), etdump_(arguments.etdump), meter_(spare) {
    auto* threads = executorch::extension::threadpool::get_threadpool();
    if (threads == nullptr) fail("ExecuTorch has no threads here: it cannot read what the CPU is");
    threads->_unsafe_reset_threadpool(arguments.threads);
    auto tracer = etdump_.empty() ? nullptr : std::make_unique<ETDumpGen>();
    tracer_ = tracer.get();
    const double before = peak_rss_mb();
    const auto start = Clock::now();
    network_ = std::make_unique<Network>(arguments.file, std::move(tracer));
    const double load_ms = milliseconds_since(start);
    std::fprintf(answers_, R"({"load_ms": %.6f, "runtime_rss_mb": %.3f, "runtime": "executorch", "runtime_version": "%s"})" "\n", load_ms,
                 before, EXECUTORCH_VERSION);
    std::fflush(answers_);
  }

  void answer(const std::vector<std::string>& words) {
    if (words.size() == 7 && words[0] == "infer") {
      infer(words[1], words[2], parse_count(words[3], "N"), shape_of(words, 4));
    } else if (words.size() == 7 && words[0] == "time") {
      time(words[1], parse_count(words[2], "UNTIMED"), parse_count(words[3], "RUNS"), shape_of(words, 4));
    } else if (words.size() == 1 && words[0] == "memory") {
      std::fprintf(answers_, "{\"peak_rss_mb\": %.3f}\n", peak_rss_mb());
    } else {
      fail("unknown command '" + (words.empty() ? "" : words[0]) + "'; known: infer IN OUT N C H W, time IN UNTIMED RUNS C H W, memory");
    }
    std::fflush(answers_);
  }

 private:
  using Shape = std::vector<executorch::aten::SizesType>;

  static Shape shape_of(const std::vector<std::string>& words, size_t first) {
    Shape shape{1};
    for (size_t i = first; i < words.size(); ++i) shape.push_back(parse_count(words[i], "a size"));
    return shape;
  }

  static size_t size_of(const Shape& shape) { return std::accumulate(shape.begin(), shape.end(), size_t{1}, std::multiplies<size_t>()); }

  void infer(const std::string& source, const std::string& target, int count, const Shape& shape) {
    std::ifstream images(source, std::ios::binary);
    std::ofstream file(target, std::ios::binary);
    for (int i = 0; i < count; ++i) {  // one at a time: the peak of memory is to be the model's
      auto image = read_floats(images, source, size_of(shape));
      const auto [logits, size] = network_->run(image.data(), shape);
      file.write(reinterpret_cast<const char*>(logits), static_cast<std::streamsize>(size * sizeof(float)));
      std::fprintf(answers_, "{\"done\": 1}\n");
      std::fflush(answers_);
    }
    if (!file.flush()) fail("cannot write " + target);
    std::fprintf(answers_, "{\"finished\": true}\n");
  }

  void time(const std::string& source, int untimed, int runs, const Shape& shape) {
    std::ifstream file(source, std::ios::binary);
    auto image = read_floats(file, source, size_of(shape));
    meter_.wait();
    for (int i = 0; i < untimed; ++i) network_->run(image.data(), shape);
    if (tracer_ != nullptr) tracer_->reset();  // leaves out loading and earlier inferences
    std::vector<double> times;
    meter_.begin();
    for (int i = 0; i < runs; ++i) {
      const auto start = Clock::now();
      network_->run(image.data(), shape);
      times.push_back(milliseconds_since(start));
    }
    const auto joules = meter_.end();
    if (tracer_ != nullptr) write_profile();
    std::fprintf(answers_, "{\"ms\": [");
    for (size_t i = 0; i < times.size(); ++i) std::fprintf(answers_, "%s%.6f", i == 0 ? "" : ", ", times[i]);
    std::fprintf(answers_, "], \"joules\": {");
    const char* separator = "";
    for (const auto& [rail, used] : joules) {
      std::fprintf(answers_, "%s\"%s\": %.6f", separator, plain(rail).c_str(), used);
      separator = ", ";
    }
    std::fprintf(answers_, "}}\n");
  }

  void write_profile() {
    const auto profile = tracer_->get_etdump_data();
    std::ofstream file(etdump_, std::ios::binary);
    file.write(static_cast<const char*>(profile.buf), static_cast<std::streamsize>(profile.size));
    std::free(profile.buf);
    if (!file.flush()) fail("cannot write " + etdump_);
  }

  FILE* answers_;
  std::string etdump_;
  energy::Meter meter_;
  ETDumpGen* tracer_;  // the network's; null without --etdump
  std::unique_ptr<Network> network_;
};

}  // namespace

int main(int count, char** words) try {
  const auto arguments = parse_arguments(count, words);
  FILE* answers = fdopen(dup(STDOUT_FILENO), "w");
  dup2(STDERR_FILENO, STDOUT_FILENO);
  const cpu_set_t spare = pin(arguments.cpus);  // before the runtime starts threads
  Server server(arguments, answers, spare);
  for (std::string line; next_line(line);) server.answer(split(line, '\t'));
  return 0;
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
