// SPDX-License-Identifier: GPL-2.0-only OR MIT
// Live events from this host's kernel: loads a backend's BPF programs, attaches them, takes in the connections
// that are open already, and hands on events. The only user of libbpf.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "bpf/event.h"
#include "source/status.h"

namespace finrace {

enum class Backend { automatic, trace, cgroup };
enum class Attach { automatic, fentry, kprobe };

/// Something that keeps a backend from working: which step, what it means, what to do instead.
/// `number`: the errno behind it, if there is one.
struct SetupError : std::runtime_error {
    explicit SetupError(const std::string& text, int number = 0) : std::runtime_error(text), error(number) {}
    int error;
};

struct LiveOptions {
    Backend backend = Backend::automatic;
    Attach attach = Attach::automatic;
    bool follow_accepted = false;              ///< connections that this host accepted, too
    bool report_states = false;                ///< EVENT_STATE for each change that has no event of its own
    std::uint32_t ring_bytes = 4U << 20U;      ///< rounded up to a power of two of at least a page
    std::uint32_t max_connections = 1U << 18U; ///< where a table of that size is needed
};

class LiveSource {
public:
    /// Throws SetupError.
    explicit LiveSource(const LiveOptions& options);
    ~LiveSource();
    LiveSource(const LiveSource&) = delete;
    LiveSource& operator=(const LiveSource&) = delete;
    LiveSource(LiveSource&&) = delete;
    LiveSource& operator=(LiveSource&&) = delete;

    /// Readable when something urgent has happened; everything else is found by calling consume() now and then.
    [[nodiscard]] int wakeup_fd() const;
    /// Descriptor of the socket storage with each connection's accounting (struct connection), for list_tcp_sockets();
    /// -1 where it is in no socket's storage.
    [[nodiscard]] int accounting() const;
    /// Hands waiting events to `handle`. IPv4-mapped addresses come as IPv4. Returns true if it left some: under a
    /// flood that comes faster than it is handled, signals and summaries would wait for ever.
    bool consume(const std::function<void(const event&)>& handle);

    [[nodiscard]] SourceFacts facts() const;
    [[nodiscard]] SourceCounts counts() const;
    /// Whether the kernel hands out its loss counters with this process's present capabilities; counts() has zeros if
    /// not.
    [[nodiscard]] bool counts_losses() const;
    /// Of those that stay attached.
    [[nodiscard]] std::vector<ProgramRuns> program_runs() const;
    [[nodiscard]] const std::vector<Hook>& hooks() const; ///< attached or not
    /// Things that went wrong without stopping anything (a namespace that can't be entered), for people.
    [[nodiscard]] const std::vector<std::string>& warnings() const;

    struct Implementation; ///< what a backend provides; known to source/live.cpp alone

private:
    std::unique_ptr<Implementation> implementation_;
};

/// One backend as it would work here, tried out: loaded, attached and detached again.
struct BackendReport {
    std::string backend;
    std::string attach; ///< empty for cgroup
    bool works = false;
    std::string problem;
    std::vector<Hook> hooks;
    std::vector<std::string> unseen;   ///< what no hook of this backend can show on this kernel
    std::vector<std::string> warnings; ///< what was refused to this process, as LiveSource::warnings()
};

/// Where the cgroup v2 hierarchy is mounted, with its root: /proc/self/mountinfo, proc(5). Throws SetupError, with
/// where it looked.
std::string cgroup_root();

/// For `finrace doctor`: tries every backend.
std::vector<BackendReport> examine_backends();

} // namespace finrace
