// SPDX-License-Identifier: GPL-2.0-only OR MIT
// This host as it is now: the connections that rest in pools, and who stands at a pool's two ends, with what they have
// been told. Nothing that it reads is run, and no more of a file is kept than the setting that is looked for.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "core/diagnosis.h"
#include "core/software.h"
#include "core/traffic.h"
#include "core/upstream.h"

namespace finrace {

/// /proc/PID/comm: the name of a process's first thread, any bytes. Empty if there is none.
std::string process_comm(std::uint32_t pid);
/// Of its control group the path below the hierarchy's root (cgroup_of()).
std::string process_cgroup(std::uint32_t pid);

/// A connection that this host opened and that is established, as it is now.
struct OpenSocket {
    SampledConnection sampled; ///< its upstream's network namespace is known
    std::uint32_t pid = 0;     ///< of its owner; 0 if not known
    std::string process;       ///< the owner's name, where the accounting has it; any bytes
};

/// Looks at the sockets of all network namespaces that can be entered. `accounting`: LiveSource::accounting(). Whose
/// owners the accounting does not tell are looked up if `with_owners`: a walk through /proc.
std::vector<OpenSocket> open_sockets(int accounting, bool with_owners);

/// Connections that the listeners of this network namespace have turned away since it began, their accept queues being
/// full: TcpExt's ListenOverflows in /proc/net/netstat (tcp_conn_request(), tcp_v4_syn_recv_sock(), Linux 5.10).
/// Nothing if that can't be read.
std::optional<std::uint64_t> listen_overflows();
/// The same, of the file's text.
std::optional<std::uint64_t> parse_listen_overflows(std::string_view netstat);

class Host {
public:
    /// Looks at all sockets of all network namespaces that can be entered, and at who holds them.
    static Host now();

    /// What can be told of a pool's ends: of the proxy's by its owner; of the upstream's if it listens on this host.
    [[nodiscard]] Ends ends(const UpstreamKey& upstream, const Owner& owner) const;

private:
    Host();

    struct Listener {
        UpstreamKey where; ///< zeros: any address
        bool both_families = false;
        std::vector<std::uint32_t> holders; ///< process ids, the lowest first
    };

    /// A process that has been asked for: many upstreams have one proxy, whose files are read once.
    struct Asked;

    [[nodiscard]] bool is_own(const UpstreamKey& upstream) const; ///< an address of this host
    [[nodiscard]] const Listener* listener(const UpstreamKey& upstream) const;
    /// Nothing if too many are kept already, or it has been read too often. Who is not known software's is not kept.
    [[nodiscard]] std::shared_ptr<const Asked> asked(std::uint32_t pid) const;

    std::vector<Listener> listeners_;
    mutable std::map<std::uint32_t, std::shared_ptr<const Asked>> asked_; ///< by process id
    mutable std::set<std::uint32_t> strangers_;      ///< holders of listeners that are no known software's
    std::shared_ptr<std::size_t> room_;              ///< bytes that may be kept of their files
    std::map<UpstreamKey, std::uint32_t> addresses_; ///< of this host, without port: which namespace has it
};

} // namespace finrace
