// What processors there are: how many this process may use, and how wide their vectors are.
#pragma once
#include <string>

namespace fastrnn::cpu {

// Those that the calling thread may run on now (its affinity, or OpenMP's places), and no more than the CPU time that
// its control groups grant: a quota of 1.5 processors counts as 2, one of 1.4 as 1. At least 1. The quota is read once
// a process, the affinity at every call.
int usable_processors();

// Of the vectors in which the kernels in use compute float32 and float64; 16 where that is the baseline.
int vector_bytes();

// The CPU time per time that Linux control groups grant, in processors; 0 where nothing limits it. `membership` is the
// text of /proc/self/cgroup, `mount` where the control groups' file system is. Version 2 (cpu.max) and 1
// (cpu.cfs_quota_us); a group's ancestors limit it, too. In a container the own group may be the mount itself.
double cpu_quota(const std::string& membership, const std::string& mount);

}  // namespace fastrnn::cpu
