// SPDX-License-Identifier: GPL-2.0-only OR MIT
#include "source/host.h"

#include <algorithm>
#include <array>
#include <cerrno>
#include <charconv>
#include <climits>
#include <cstring>
#include <ctime>
#include <filesystem>
#include <iterator>
#include <memory>
#include <set>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>

#include <dirent.h>
#include <fcntl.h>
#include <fnmatch.h>
#include <ifaddrs.h>
#include <linux/openat2.h>
#include <netinet/in.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <fmt/format.h>

#include "bpf/connection.h"
#include "core/flags.h"
#include "core/units.h"
#include "source/configuration.h"
#include "source/container.h"
#include "source/descriptor.h"
#include "source/placement.h"
#include "source/sockets.h"

namespace finrace {

namespace {

namespace fs = std::filesystem;

constexpr std::size_t largest_file = 1U << 20U;
constexpr std::size_t most_read = 16U << 20U; ///< of one process's files, all together
// Any user's process may be called nginx, and name what it likes.
constexpr std::size_t most_handed = 256U << 20U; ///< of them, read anew for each upstream; of no more anything is told
constexpr std::size_t most_listed = 1U << 16U;   ///< names in folders
constexpr std::size_t most_names = 8U << 20U;    ///< bytes that a pattern may become
constexpr std::size_t most_words = 1U << 12U;    ///< of a command line, or an environment
constexpr std::size_t most_asked = 256;          ///< processes, each with a descriptor
constexpr std::size_t most_kept = 256U << 20U;   ///< of the files of all processes
constexpr std::size_t most_holders = 16;         ///< of a listening socket: workers, of which each is as good
constexpr unsigned most_parents = 8;

/// Of a process by the kernel's number: no file's name where /proc has other numbers.
std::string proc_file(std::uint32_t pid, std::string_view name)
{
    return sees_host_processes() ? fmt::format("/proc/{}/{}", pid, name) : std::string();
}

std::string read_proc(std::uint32_t pid, std::string_view name)
{
    return read_whole(proc_file(pid, name));
}

std::vector<std::string> split_at_zeros(std::string_view text)
{
    std::vector<std::string> words;
    while (!text.empty() && words.size() < most_words) {
        const std::size_t end = std::min(text.find('\0'), text.size());
        words.emplace_back(text.substr(0, end));
        text.remove_prefix(std::min(end + 1, text.size()));
    }
    return words;
}

/// proc(5), /proc/PID/stat: field `number`, from 4 on (what stands before may hold spaces).
std::uint64_t stat_field(std::uint32_t pid, unsigned number)
{
    const std::string text = read_proc(pid, "stat");
    const std::size_t end_of_name = text.rfind(')');
    std::uint64_t value = 0;
    if (end_of_name == std::string::npos)
        return value;
    std::size_t at = end_of_name + 1; // the space before field 3
    for (unsigned field = 3; field < number && at != std::string::npos; ++field)
        at = text.find(' ', at + 1);
    if (at != std::string::npos && at + 1 < text.size())
        std::from_chars(text.data() + at + 1, text.data() + text.size(), value);
    return value;
}

std::int64_t started_s(std::uint32_t pid)
{
    constexpr unsigned starttime = 22;
    timespec real{};
    timespec boot{};
    ::clock_gettime(CLOCK_REALTIME, &real);
    ::clock_gettime(CLOCK_BOOTTIME, &boot);
    const auto ticks = static_cast<std::int64_t>(stat_field(pid, starttime));
    // To the second after: a file that was written just before is older.
    return real.tv_sec - boot.tv_sec + ticks / ::sysconf(_SC_CLK_TCK) + 2;
}

/// The files of a process, as it sees them: below its own root, whatever links say.
class ProcessFiles {
public:
    /// `room`: bytes that may be kept of files, of this process and others.
    ProcessFiles(std::uint32_t pid, std::size_t& room)
        : root_(::open(proc_file(pid, "root").c_str(), O_PATH | O_DIRECTORY | O_CLOEXEC)), room_(room)
    {
    }

    std::vector<ConfigurationFile> open_files(const std::string& path)
    {
        if (path.size() >= PATH_MAX)
            return {};
        const auto [found, fresh] = opened_.try_emplace(path);
        std::vector<ConfigurationFile>& files = found->second;
        if (fresh)
            for (const std::string& name : names_of(path))
                add(files, name, true);
        for (const ConfigurationFile& file : files)
            handed_ += file.text.size();
        return files;
    }

    /// Whether what has been read of them for other upstreams was too much.
    [[nodiscard]] bool exhausted() const { return handed_ > most_handed; }

private:
    /// What a path that may have patterns stands for, without a slash at the beginning.
    [[nodiscard]] std::vector<std::string> names_of(const std::string& path)
    {
        std::vector<std::string> names{""};
        fs::path plain; // what follows the last pattern so far
        for (const fs::path& part : fs::path(path).lexically_normal().relative_path()) {
            if (part.native().find_first_of("*?[") == std::string::npos) {
                plain /= part;
                continue;
            }
            names = extended(joined(names, plain), part);
            plain.clear();
        }
        return joined(names, plain);
    }

    [[nodiscard]] static std::vector<std::string> joined(const std::vector<std::string>& names, const fs::path& plain)
    {
        std::vector<std::string> longer;
        std::size_t bytes = 0;
        for (const std::string& name : names) {
            longer.push_back(plain.empty() ? name : (fs::path(name) / plain).native());
            if (bytes += longer.back().size(); bytes > most_names)
                break;
        }
        return longer;
    }

    [[nodiscard]] Descriptor opened(const std::string& path, std::uint64_t flags) const
    {
        open_how how{};
        how.flags = flags | O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY;
        how.resolve = RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS;
        return Descriptor(static_cast<int>(
            ::syscall(SYS_openat2, root_.get(), path.empty() ? "." : path.c_str(), &how, sizeof(how))));
    }

    [[nodiscard]] std::vector<std::string> names_in(const std::string& directory)
    {
        std::vector<std::string> names;
        Descriptor fd = opened(directory, O_DIRECTORY);
        const std::unique_ptr<DIR, int (*)(DIR*)> listing(::fdopendir(::dup(fd.get())), ::closedir);
        if (!listing)
            return names;
        while (listed_ < most_listed) {
            const dirent* entry = ::readdir(listing.get()); // NOLINT(concurrency-mt-unsafe): a DIR of our own
            if (entry == nullptr)
                break;
            ++listed_;
            if (entry->d_name[0] != '.')
                names.emplace_back(entry->d_name);
        }
        std::sort(names.begin(), names.end());
        return names;
    }

    /// One component further, which is a pattern.
    [[nodiscard]] std::vector<std::string> extended(const std::vector<std::string>& paths, const std::string& pattern)
    {
        std::vector<std::string> longer;
        std::size_t bytes = 0;
        for (const std::string& path : paths)
            for (const std::string& name : names_in(path)) {
                if (::fnmatch(pattern.c_str(), name.c_str(), FNM_PERIOD) != 0)
                    continue;
                longer.push_back(path.empty() ? name : fmt::format("{}/{}", path, name));
                if (bytes += longer.back().size(); bytes > most_names)
                    return longer;
            }
        return longer;
    }

    void add(std::vector<ConfigurationFile>& files, const std::string& path, bool with_directories)
    {
        const Descriptor fd = opened(path, 0);
        struct stat status {};
        if (!fd || ::fstat(fd.get(), &status) != 0)
            return;
        if (S_ISDIR(status.st_mode) && with_directories) {
            for (const std::string& name : names_in(path))
                add(files, fmt::format("{}/{}", path, name), false);
            return;
        }
        if (!S_ISREG(status.st_mode) || static_cast<std::size_t>(status.st_size) > largest_file ||
            read_ + static_cast<std::size_t>(status.st_size) > most_read ||
            static_cast<std::size_t>(status.st_size) > room_)
            return;
        std::string text(static_cast<std::size_t>(status.st_size), '\0');
        std::size_t size = 0;
        while (size < text.size()) {
            const ssize_t got = ::read(fd.get(), text.data() + size, text.size() - size);
            if (got < 0 && errno == EINTR)
                continue;
            if (got <= 0)
                break;
            size += static_cast<std::size_t>(got);
        }
        text.resize(size);
        read_ += size;
        room_ -= size;
        files.push_back({.path = '/' + path, .text = std::move(text), .modified_s = status.st_mtim.tv_sec});
    }

    Descriptor root_;
    std::map<std::string, std::vector<ConfigurationFile>> opened_; ///< by what was asked for
    std::size_t& room_;
    std::size_t read_ = 0;
    std::size_t handed_ = 0;
    std::size_t listed_ = 0;
};

/// A worker's command line is its master's: the topmost of its parents of the same name.
ProcessFacts facts_of(std::uint32_t pid)
{
    constexpr unsigned ppid = 4;
    ProcessFacts facts{.pid = pid,
                       .name = process_comm(pid),
                       .arguments = {},
                       .environment = {},
                       .directory = {},
                       .started_s = started_s(pid)};
    for (unsigned i = 0; i < most_parents; ++i) {
        const auto parent = static_cast<std::uint32_t>(stat_field(facts.pid, ppid));
        if (parent <= 1 || process_comm(parent) != facts.name)
            break;
        facts.pid = parent;
    }
    facts.arguments = split_at_zeros(read_proc(facts.pid, "cmdline"));
    const std::vector<std::string_view> wanted = deciding_variables();
    for (const std::string& variable : split_at_zeros(read_proc(facts.pid, "environ"))) {
        const std::size_t equals = variable.find('=');
        if (equals != std::string::npos &&
            std::find(wanted.begin(), wanted.end(), std::string_view(variable).substr(0, equals)) != wanted.end())
            facts.environment[variable.substr(0, equals)] = variable.substr(equals + 1);
    }
    std::error_code gone;
    facts.directory = fs::read_symlink(proc_file(facts.pid, "cwd"), gone).string();
    return facts;
}

UpstreamKey key_of(const std::array<std::uint8_t, 16>& address, std::uint16_t port, std::uint8_t family,
                   std::uint32_t netns)
{
    UpstreamKey key{.address = address, .port = port, .family = family, .netns = 0};
    if (key.is_loopback())
        key.netns = netns;
    return key;
}

std::uint32_t this_network_namespace()
{
    struct stat status {};
    return ::stat("/proc/thread-self/ns/net", &status) == 0 ? static_cast<std::uint32_t>(status.st_ino) : 0;
}

/// Calls `handle` with each address, and its family, of the network namespace that the calling thread is in.
template <typename Handle>
void for_each_own_address(const Handle& handle)
{
    ifaddrs* all = nullptr;
    if (::getifaddrs(&all) != 0)
        return;
    for (const ifaddrs* one = all; one != nullptr; one = one->ifa_next) {
        std::array<std::uint8_t, 16> address{};
        if (one->ifa_addr == nullptr)
            continue;
        if (one->ifa_addr->sa_family == AF_INET) {
            std::memcpy(address.data(), &reinterpret_cast<const sockaddr_in*>(one->ifa_addr)->sin_addr, 4);
            handle(address, std::uint8_t{4});
        } else if (one->ifa_addr->sa_family == AF_INET6) {
            std::memcpy(address.data(), &reinterpret_cast<const sockaddr_in6*>(one->ifa_addr)->sin6_addr, 16);
            handle(address, std::uint8_t{6});
        }
    }
    ::freeifaddrs(all);
}

/// The TCP sockets of the network namespace that the calling thread is in.
class SocketList {
public:
    explicit SocketList(int accounting = -1)
    {
        list_tcp_sockets(
            [&](const ListedSocket& socket) {
                sockets_.push_back(socket);
                if (socket.state == TCP_STATE_LISTEN)
                    listening_.insert(socket.local_port);
            },
            accounting);
    }

    [[nodiscard]] const std::vector<ListedSocket>& all() const { return sockets_; }
    /// A connection that is established, and that no listener has accepted.
    [[nodiscard]] bool was_opened_here(const ListedSocket& socket) const
    {
        return socket.state == TCP_STATE_ESTABLISHED && listening_.count(socket.local_port) == 0;
    }

private:
    std::vector<ListedSocket> sockets_;
    std::set<std::uint16_t> listening_;
};

/// Something came in, and nothing has been sent since.
bool is_answered(const ListedSocket& socket)
{
    return socket.last_receive_ns != 0 && socket.last_receive_ns >= socket.last_send_ns;
}

} // namespace

std::vector<OpenSocket> open_sockets(int accounting, bool with_owners)
{
    std::vector<OpenSocket> open;
    const SocketOwners owners = with_owners ? find_socket_owners() : SocketOwners();
    in_each_network_namespace([&] {
        const std::uint32_t netns = this_network_namespace();
        const SocketList sockets(accounting);
        const std::uint64_t now_ns = monotonic_ns();
        for (const ListedSocket& socket : sockets.all()) {
            const connection& c = socket.accounting;
            const bool followed = c.id != 0 && !has(c, CONNECTION_IGNORED);
            if (!sockets.was_opened_here(socket) || (followed && !has(c, CONNECTION_CLIENT)))
                continue;
            OpenSocket one{.sampled = {.upstream = key_of(socket.peer_address, socket.peer_port, socket.family, netns)},
                           .pid = c.pid,
                           .process = std::string(c.comm, ::strnlen(c.comm, sizeof(c.comm)))};
            if (followed) {
                one.sampled.id = c.id;
                one.sampled.exchange = c.exchange;
            }
            // Opened ahead, and nothing asked of it yet: idle as well. The socket's own times alone don't tell a
            // request from the answer of the same tick before it.
            one.sampled.busy = followed ? connection_awaits_response(&c, socket.bytes_received) != 0
                                        : socket.last_send_ns != 0 && !is_answered(socket);
            one.sampled.used = socket.last_receive_ns != 0;
            const std::uint64_t since_ns = socket.last_receive_ns != 0 ? socket.last_receive_ns : c.opened_ns;
            if (!one.sampled.busy && since_ns != 0 && now_ns > since_ns)
                one.sampled.rested_ms = (now_ns - since_ns) / ns_per_ms;
            if (const auto found = owners.find(socket.inode); one.pid == 0 && found != owners.end())
                one.pid = found->second;
            open.push_back(std::move(one));
        }
    });
    return open;
}

std::string process_cgroup(std::uint32_t pid)
{
    return cgroup_of(read_proc(pid, "cgroup"));
}

std::string process_comm(std::uint32_t pid)
{
    std::string name = read_proc(pid, "comm");
    if (!name.empty())
        name.pop_back(); // a name may hold newlines; the kernel adds one more at the end
    return name;
}

Host Host::now()
{
    Host host;
    std::unordered_map<std::uint32_t, std::vector<std::uint32_t>> holders;
    for_each_socket_holder([&](std::uint32_t inode, std::uint32_t pid) {
        std::vector<std::uint32_t>& pids = holders[inode];
        if (pids.empty() || pids.back() != pid)
            pids.push_back(pid);
    });
    for (auto& [inode, pids] : holders)
        std::sort(pids.begin(), pids.end());
    const auto holders_of = [&](std::uint32_t inode) {
        const auto found = holders.find(inode);
        return found != holders.end() ? found->second : std::vector<std::uint32_t>();
    };

    // What can't be entered has been told of by the source.
    in_each_network_namespace([&] {
        const std::uint32_t netns = this_network_namespace();
        for_each_own_address([&](const std::array<std::uint8_t, 16>& address, std::uint8_t family) {
            host.addresses_.emplace(UpstreamKey{.address = address, .port = 0, .family = family, .netns = 0}, netns);
        });
        const SocketList sockets;
        for (const ListedSocket& socket : sockets.all()) {
            if (socket.state != TCP_STATE_LISTEN)
                continue;
            // Of an IPv6 socket without an address it is not known whether it takes IPv4 as well: most do.
            const bool any = socket.local_address == std::array<std::uint8_t, 16>{};
            host.listeners_.push_back({.where = {.address = socket.local_address,
                                                 .port = socket.local_port,
                                                 .family = socket.family,
                                                 .netns = netns},
                                       .both_families = any && socket.family == 6,
                                       .holders = holders_of(socket.inode)});
        }
    });
    return host;
}

bool Host::is_own(const UpstreamKey& upstream) const
{
    // A loopback address without a namespace is this one's own, as far as anybody can tell.
    return upstream.is_loopback() ||
           addresses_.count({.address = upstream.address, .port = 0, .family = upstream.family, .netns = 0}) != 0;
}

const Host::Listener* Host::listener(const UpstreamKey& upstream) const
{
    const auto own = addresses_.find({.address = upstream.address, .port = 0, .family = upstream.family, .netns = 0});
    if (!is_own(upstream))
        return nullptr;
    const auto fits = [&](const Listener& one, bool by_address) {
        if (one.where.port != upstream.port)
            return false;
        if (upstream.netns != 0 ? one.where.netns != upstream.netns
                                : own != addresses_.end() && !upstream.is_loopback() && one.where.netns != own->second)
            return false;
        if (by_address)
            return one.where.family == upstream.family && one.where.address == upstream.address;
        return one.where.address == std::array<std::uint8_t, 16>{} &&
               (one.where.family == upstream.family || one.both_families);
    };
    for (const bool by_address : {true, false})
        for (const Listener& one : listeners_)
            if (fits(one, by_address))
                return &one;
    return nullptr;
}

struct Host::Asked {
    Asked(std::uint32_t pid, std::size_t& room) : process(facts_of(pid)), files(process.pid, room) {}

    ProcessFacts process;
    ProcessFiles files;
    OpenFiles open_files = [this](const std::string& path) { return files.open_files(path); };
};

Host::Host() : room_(std::make_shared<std::size_t>(most_kept)) {}

std::shared_ptr<const Host::Asked> Host::asked(std::uint32_t pid) const
{
    if (const auto known = asked_.find(pid); known != asked_.end())
        return known->second->files.exhausted() ? nullptr : known->second;
    return asked_.size() < most_asked ? std::make_shared<Asked>(pid, *room_) : nullptr;
}

Ends Host::ends(const UpstreamKey& upstream, const Owner& owner) const
{
    Ends ends;
    ends.proxy.software = setting_of_proxy(owner.process);
    if (ends.proxy.software != nullptr && owner.pid != 0) {
        const auto proxy = asked(owner.pid);
        // Its name may be its thread's; but another process may have its number by now.
        const IdleSetting* by_name = proxy ? setting_of_proxy(proxy->process.name) : nullptr;
        if (proxy && (by_name == nullptr || by_name == ends.proxy.software)) {
            asked_.emplace(owner.pid, proxy);
            ends.proxy.pid = proxy->process.pid;
            ends.proxy.present = present_of_proxy(*ends.proxy.software, proxy->process, upstream, proxy->open_files);
        }
    }
    const Listener* there = listener(upstream);
    if (is_own(upstream))
        ends.upstream.listens = there != nullptr;
    if (there == nullptr)
        return ends;
    for (std::size_t i = 0; i < std::min(there->holders.size(), most_holders); ++i) {
        const std::uint32_t pid = there->holders[i];
        if (strangers_.count(pid) != 0)
            continue;
        const auto server = asked(pid);
        if (!server)
            break;
        const IdleSetting* software = setting_of_server(server->process.name, server->process.arguments);
        if (software == nullptr) {
            strangers_.insert(pid);
            continue;
        }
        asked_.emplace(pid, server);
        ends.upstream = {.software = software,
                         .pid = server->process.pid,
                         .present = present_of_server(*software, server->process, server->open_files),
                         .listens = true,
                         .recycling = recycling_of_server(*software, server->process),
                         .worker_limit = worker_limit_of_server(*software, server->process, server->open_files)};
        break;
    }
    return ends;
}

std::optional<std::uint64_t> parse_listen_overflows(std::string_view netstat)
{
    // Two lines for each protocol: names, then values, both behind its own name.
    const auto words_of = [&netstat]() {
        const std::string_view line = netstat.substr(0, netstat.find('\n'));
        netstat.remove_prefix(std::min(netstat.size(), line.size() + 1));
        std::vector<std::string_view> words;
        for (std::size_t at = 0; at < line.size();) {
            const std::size_t end = std::min(line.find(' ', at), line.size());
            if (end > at)
                words.push_back(line.substr(at, end - at));
            at = end + 1;
        }
        return words;
    };
    while (!netstat.empty()) {
        const std::vector<std::string_view> names = words_of();
        const std::vector<std::string_view> values = words_of();
        if (names.empty() || names.front() != "TcpExt:")
            continue;
        const auto found = std::find(names.begin(), names.end(), "ListenOverflows");
        const auto index = static_cast<std::size_t>(found - names.begin());
        std::uint64_t count = 0;
        if (found == names.end() || index >= values.size() ||
            std::from_chars(values[index].data(), values[index].data() + values[index].size(), count).ec != std::errc())
            return std::nullopt;
        return count;
    }
    return std::nullopt;
}

std::optional<std::uint64_t> listen_overflows()
{
    return parse_listen_overflows(read_whole("/proc/self/net/netstat"));
}

} // namespace finrace
