// SPDX-License-Identifier: GPL-2.0-only OR MIT
// The names of processes, and where they belong: as /proc has them now, or as they were noted when their events came.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>

#include "source/placement.h"

namespace finrace {

class ProcessNames {
public:
    virtual ~ProcessNames() = default;
    ProcessNames() = default;
    ProcessNames(const ProcessNames&) = delete;
    ProcessNames& operator=(const ProcessNames&) = delete;

    /// The name of a process: of its first thread, any bytes. Empty if it is not known.
    [[nodiscard]] virtual const std::string& of(std::uint32_t pid) const = 0;
    /// Its container, pod or unit, as far as they are known.
    [[nodiscard]] virtual const Placement& placement(std::uint32_t pid) const = 0;
};

/// As /proc/PID/comm and /proc/PID/cgroup have it. Kept for a second: a filter asks for each event.
class LiveProcessNames final : public ProcessNames {
public:
    [[nodiscard]] const std::string& of(std::uint32_t pid) const override;
    [[nodiscard]] const Placement& placement(std::uint32_t pid) const override;
    /// PodNames's.
    int keep_pods_open() { return pods_.keep_open(); }

private:
    void empty_in_time() const;

    mutable std::unordered_map<std::uint32_t, std::string> names_;
    mutable std::unordered_map<std::uint32_t, Placement> placements_;
    mutable PodNames pods_;
    mutable std::chrono::steady_clock::time_point emptied_{};
};

/// As they were noted. Beyond its capacity all are forgotten: whoever notes the same gets the same.
class NotedProcessNames final : public ProcessNames {
public:
    static constexpr std::size_t capacity = 1U << 14U;

    [[nodiscard]] const std::string& of(std::uint32_t pid) const override;
    [[nodiscard]] const Placement& placement(std::uint32_t pid) const override;
    /// Returns whether that is new.
    bool note(std::uint32_t pid, std::string_view name);
    bool note(std::uint32_t pid, const Placement& placement);
    void clear() { noted_.clear(); }

private:
    struct Noted {
        std::string name{};
        Placement placement{};
    };
    Noted& at(std::uint32_t pid);

    std::unordered_map<std::uint32_t, Noted> noted_;
};

} // namespace finrace
