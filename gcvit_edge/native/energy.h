// Joules that the power rails of a device use while inferences are timed, as far as its kernel lets this user read them below /sys.
//
//   RAPL     counters of x86 CPUs. Source: Linux, Documentation/power/powercap/powercap.rst
//   ODPM     counters of Google's phones. Source: drivers/iio/power/odpm.c of their kernels
//   INA3221  sensors of power on Jetson boards, sampled meanwhile. Source: Linux, Documentation/hwmon/ina3221.rst
//
// A rail that cannot be told for the time between begin() and end() is left out, never guessed.
#pragma once

#include <sched.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <cstddef>
#include <cstdlib>
#include <ctime>
#include <filesystem>
#include <fstream>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

namespace energy {

using Joules = std::map<std::string, double>;

inline std::optional<std::string> read_line(const std::filesystem::path& path) {
  std::ifstream file(path);
  std::string line;
  if (!std::getline(file, line)) return std::nullopt;
  return line;
}

inline std::optional<double> read_number(const std::filesystem::path& path) {
  double value;
  if (std::ifstream file(path); file >> value) return value;
  return std::nullopt;
}

// Folders below `root` whose names start with `start`, in order.
inline std::vector<std::filesystem::path> folders(const std::filesystem::path& root, const std::string& start) {
  std::vector<std::filesystem::path> found;
  std::error_code absent;
  for (std::filesystem::directory_iterator entry(root, absent), end; !absent && entry != end; entry.increment(absent)) {
    if (entry->path().filename().string().rfind(start, 0) == 0) found.push_back(entry->path());
  }
  std::sort(found.begin(), found.end());
  return found;
}

inline double seconds() {  // of the clock that ODPM stamps its counts with
  timespec now;
  clock_gettime(CLOCK_BOOTTIME, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

// A domain counts microjoules, and from `range` on again from 0; it is read at the very begin and end.
class Rapl {
 public:
  Rapl() {
    for (const auto& folder : folders("/sys/class/powercap", "intel-rapl:")) {
      const auto name = read_line(folder / "name");
      const auto range = read_number(folder / "max_energy_range_uj");
      if (!name || !range || !read_number(folder / "energy_uj")) continue;
      const auto id = folder.filename().string();
      const auto parent = id.substr(0, id.rfind(':'));  // of a sub-domain: its package
      const auto package = parent == "intel-rapl" ? std::nullopt : read_line(folder.parent_path() / parent / "name");
      domains_.push_back({package ? *package + "/" + *name : *name, folder / "energy_uj", *range + 1, 0});
    }
  }

  void begin() {
    for (auto& domain : domains_) domain.start = read_number(domain.path).value_or(-1);
  }

  void end(Joules& joules) const {
    for (const auto& domain : domains_) {
      const auto now = read_number(domain.path);
      if (!now || domain.start < 0) continue;
      const double used = *now - domain.start;
      joules[domain.name] = 1e-6 * (used < 0 ? used + domain.range : used);
    }
  }

 private:
  struct Domain {
    std::string name;
    std::filesystem::path path;
    double range, start;
  };
  std::vector<Domain> domains_;
};

// A chip counts the microjoules of several rails, but its driver passes on new counts only every 20 ms to 3 s. They are stamped:
// where begin and end of the counted time lie further from those of the timed one than a tenth of it, the rails are left out.
class Odpm {
 public:
  explicit Odpm(std::filesystem::path path) : path_(std::move(path)) {}

  void begin() { start_ = read(); }

  // Whether new counts have just been passed on.
  bool fresh() const { return seconds() - read().time < 0.005; }

  void end(double from, double to, Joules& joules) const {
    const auto now = read();
    const double counted = now.time - start_.time;
    if (counted <= 0 || std::abs(start_.time - from) + std::abs(now.time - to) > 0.1 * (to - from)) return;
    for (const auto& [rail, count] : now.counts) {
      const auto before = start_.counts.find(rail);
      if (before == start_.counts.end() || count < before->second) continue;  // the channel was given another rail
      joules[rail] = 1e-6 * (count - before->second) * (to - from) / counted;
    }
  }

 private:
  struct Reading {
    double time = 0;  // seconds
    std::map<std::string, double> counts;
  };

  // "t=MILLISECONDS", then a line "CH0(T=MILLISECONDS)[RAIL], MICROJOULES" a channel
  Reading read() const {
    Reading reading;
    std::ifstream file(path_);
    for (std::string line; std::getline(file, line);) {
      const auto open = line.find('['), close = line.find("], ");
      char* rest = nullptr;
      if (line.rfind("t=", 0) == 0) {
        reading.time = 1e-3 * std::strtod(line.c_str() + 2, &rest);
      } else if (line.rfind("CH", 0) == 0 && open < close && close != std::string::npos) {
        const double count = std::strtod(line.c_str() + close + 3, &rest);
        if (rest != line.c_str() + close + 3) reading.counts[line.substr(open + 1, close - open - 1)] = count;
      }
    }
    return reading;
  }

  std::filesystem::path path_;
  Reading start_;
};

// Sensors say what power is now (the mean of their last few milliseconds), so a thread reads them all the time and sums up.
class Ina3221 {
 public:
  // spare: CPUs that the thread may run on, so that it does not disturb those that are timed
  explicit Ina3221(const cpu_set_t& spare) : spare_(spare) {
    for (const auto& chip : folders("/sys/class/hwmon", "hwmon")) {
      if (read_line(chip / "name") != "ina3221") continue;
      for (const char* channel : {"1", "2", "3"}) {
        const auto label = read_line(chip / ("in" + std::string(channel) + "_label"));
        const Rail rail{label.value_or(""), chip / ("in" + std::string(channel) + "_input"), chip / ("curr" + std::string(channel) + "_input")};
        if (!rail.name.empty() && rail.watts()) rails_.push_back(rail);
      }
      period_ = std::max(period_, 1e-3 * read_number(chip / "update_interval").value_or(0));
    }
  }

  ~Ina3221() { stop(); }

  void begin() {
    samples_.clear();
    if (rails_.empty()) return;
    stopped_ = false;
    thread_ = std::thread([this] {
      if (CPU_COUNT(&spare_) > 0) sched_setaffinity(0, sizeof(spare_), &spare_);
      std::unique_lock<std::mutex> lock(mutex_);
      do {
        sample();
      } while (!wake_.wait_for(lock, std::chrono::duration<double>(period_), [this] { return stopped_; }));
      sample();
    });
  }

  void end(double from, double to, Joules& joules) {
    stop();
    if (samples_.size() < kMinSamples) return;
    const double sampled = samples_.back().time - samples_.front().time;
    for (size_t rail = 0; rail < rails_.size(); ++rail) {
      double sum = 0;
      bool whole = true;
      for (size_t i = 1; i < samples_.size(); ++i) {
        const auto &before = samples_[i - 1].watts[rail], &after = samples_[i].watts[rail];
        whole = whole && before && after;
        if (whole) sum += (samples_[i].time - samples_[i - 1].time) * (*before + *after) / 2;
      }
      if (whole) joules[rails_[rail].name] = sum * (to - from) / sampled;
    }
  }

 private:
  static constexpr size_t kMinSamples = 20;  // the first and the last are partly of the time before and after

  struct Rail {
    std::string name;
    std::filesystem::path millivolts, milliamperes;

    std::optional<double> watts() const {
      const auto volts = read_number(millivolts), amperes = read_number(milliamperes);
      if (!volts || !amperes) return std::nullopt;  // a channel that is not connected or not enabled
      return 1e-6 * *volts * *amperes;
    }
  };

  struct Sample {
    double time;
    std::vector<std::optional<double>> watts;
  };

  void sample() {
    Sample sample{seconds(), {}};
    for (const auto& rail : rails_) sample.watts.push_back(rail.watts());
    samples_.push_back(std::move(sample));
  }

  void stop() {
    if (!thread_.joinable()) return;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      stopped_ = true;
    }
    wake_.notify_one();
    thread_.join();
  }

  std::vector<Rail> rails_;
  std::vector<Sample> samples_;
  double period_ = 0.01;
  cpu_set_t spare_;
  std::thread thread_;
  std::mutex mutex_;
  std::condition_variable wake_;
  bool stopped_ = true;
};

// All of them.
class Meter {
 public:
  explicit Meter(const cpu_set_t& spare) : sensors_(spare) {
    for (const auto& device : folders("/sys/bus/iio/devices", "iio:device")) {
      if (read_line(device / "energy_value")) chips_.emplace_back(device / "energy_value");
    }
  }

  // Waits until what chips count is new, or can be seen not to come, which need not be seen twice; before begin(), so that between the two
  // there may be inferences, and no pause before what is timed.
  void wait() {
    const double limit = seconds() + 0.1;
    while (timely_ && !std::all_of(chips_.begin(), chips_.end(), [](const Odpm& chip) { return chip.fresh(); })) {
      timely_ = seconds() < limit;
      std::this_thread::sleep_for(std::chrono::milliseconds(2));
    }
  }

  void begin() {
    for (auto& chip : chips_) chip.begin();
    sensors_.begin();
    rapl_.begin();
    start_ = seconds();
  }

  Joules end() {
    const double now = seconds();
    Joules joules;
    rapl_.end(joules);
    for (const auto& chip : chips_) chip.end(start_, now, joules);
    sensors_.end(start_, now, joules);
    return joules;
  }

 private:
  Rapl rapl_;
  std::vector<Odpm> chips_;
  Ina3221 sensors_;
  bool timely_ = true;
  double start_ = 0;
};

}  // namespace energy
