// Findings, and source lines for return addresses (in a shared object too).
#include <dlfcn.h>

#include <cstdarg>
#include <cstdio>

#include "runtime.h"

namespace fastrnn::emu {
namespace {

std::vector<std::string> found;
std::set<std::string> keys;
std::set<std::pair<const void*, const void*>> pairs;
constexpr size_t kMostFindings = 40;

// The innermost line that is not inside the stand-in's own inline functions.
std::string ask_addr2line(Pc pc) {
  Dl_info info{};
  if (!dladdr(pc, &info) || !info.dli_fname) return "?";
  size_t address = size_t(static_cast<const char*>(pc) - static_cast<const char*>(info.dli_fbase)) - 1;
  std::string command = format("addr2line -i -s -e '%s' %zx", info.dli_fname, address);
  FILE* pipe = popen(command.c_str(), "r");
  if (!pipe) return "?";
  std::string line = "?";
  char text[512];
  bool taken = false;
  while (fgets(text, sizeof text, pipe)) {
    if (taken) continue;
    std::string s(text);
    line = s.substr(0, s.find_first_of(" \n"));
    taken = line.rfind("emu.h:", 0) != 0 && line.rfind("device.cuh:", 0) != 0;
  }
  pclose(pipe);
  return line;
}

}  // namespace

std::string line_of(Pc pc) {
  static std::map<Pc, std::string> known;
  if (!pc) return "?";
  std::string& line = known[pc];
  if (line.empty()) line = ask_addr2line(pc);
  return line;
}

std::string format(const char* pattern, ...) {
  char text[1000];
  va_list arguments;
  va_start(arguments, pattern);
  vsnprintf(text, sizeof text, pattern, arguments);
  va_end(arguments);
  return text;
}

void report(const std::string& key, const std::string& text) {
  if (found.size() < kMostFindings && keys.insert(key).second) found.push_back(text);
}

const std::vector<std::string>& findings() { return found; }

bool first_report(const void* a, const void* b) { return pairs.insert({a, b}).second; }

void report_at(Pc pc, const char* kind, const std::string& text) {
  if (first_report(pc, kind)) report(line_of(pc) + kind, line_of(pc) + ": " + text);
}

void forget_findings() {
  pairs.clear();
  found.clear();
  keys.clear();
}

}  // namespace fastrnn::emu
