#include "processors.h"

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>

namespace fastrnn::cpu {
namespace {

std::string text_of(const std::string& path) {
  std::string text;
  if (std::FILE* file = std::fopen(path.c_str(), "r")) {
    char block[4096];
    for (size_t n; (n = std::fread(block, 1, sizeof block, file)) > 0;) text.append(block, n);
    std::fclose(file);
  }
  return text;
}

// The two numbers that a text begins with, one over the other; 0 where they are not above 0 ("max", -1: no limit).
double ratio_of(const std::string& text) {
  char* end = nullptr;
  const double quota = std::strtod(text.c_str(), &end), period = std::strtod(end, nullptr);
  return quota > 0 && period > 0 ? quota / period : 0;
}

void take_lower(double& lowest, double limit) {
  if (limit > 0 && (lowest == 0 || limit < lowest)) lowest = limit;
}

// The lowest limit of a group ("" or "/a/b") and its ancestors.
double lowest_limit(const std::string& mount, std::string group, bool second) {
  double lowest = 0;
  for (;;) {
    const std::string folder = mount + group;
    take_lower(lowest, ratio_of(second ? text_of(folder + "/cpu.max")
                                       : text_of(folder + "/cpu.cfs_quota_us") + " " +
                                             text_of(folder + "/cpu.cfs_period_us")));
    const size_t slash = group.rfind('/');
    if (slash == std::string::npos) return lowest;
    group.resize(slash);
  }
}

}  // namespace

double cpu_quota(const std::string& membership, const std::string& mount) {
  double lowest = 0;
  for (size_t begin = 0; begin < membership.size();) {  // lines id:controllers:group
    const size_t end = std::min(membership.find('\n', begin), membership.size());
    const std::string line = membership.substr(begin, end - begin);
    begin = end + 1;
    const size_t first = line.find(':'), last = line.find(':', first + 1);
    if (first == std::string::npos || last == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, last - first - 1);
    std::string group = line.substr(last + 1);
    if (group == "/") group.clear();
    if (controllers.empty()) take_lower(lowest, lowest_limit(mount, group, /*second=*/true));
    if (("," + controllers + ",").find(",cpu,") == std::string::npos) continue;
    for (const std::string& folder : {controllers, std::string("cpu")})
      take_lower(lowest, lowest_limit(mount + "/" + folder, group, /*second=*/false));
  }
  return lowest;
}

int usable_processors() {
  static const int granted = [] {
    const double quota = cpu_quota(text_of("/proc/self/cgroup"), "/sys/fs/cgroup");
    return quota > 0 ? int(std::lround(std::clamp(quota, 1.0, 1e6))) : 1 << 20;
  }();
  return std::max(1, std::min(omp_get_num_procs(), granted));
}

}  // namespace fastrnn::cpu
