// SPDX-License-Identifier: GPL-2.0-only OR MIT
//
// A backend is a BPF object with a table of its programs: what each one shows, whether it must be there, and on
// which kernels it has a place at all. Everything else is the same for all of them.
#include "source/live.h"

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <fstream>
#include <optional>
#include <set>
#include <sstream>
#include <string_view>

#include <bpf/bpf.h>
#include <bpf/btf.h>
#include <bpf/libbpf.h>
#include <fcntl.h>
#include <sys/resource.h>
#include <sys/utsname.h>
#include <unistd.h>

#include <fmt/format.h>

#include "core/address.h"
#include "source/container.h"
#include "source/descriptor.h"
#include "source/sockets.h"

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wconversion"
#pragma GCC diagnostic ignored "-Wpedantic"
#include "cgroup_backend.skel.h"
#include "trace_hash.skel.h"
#include "trace_kprobe.skel.h"
#include "trace_storage.skel.h"
#pragma GCC diagnostic pop

namespace finrace {

namespace {

/// libbpf's own words since the last clear(): the verifier's verdict is in there.
class LibbpfLog {
public:
    static void install() { libbpf_set_print(&LibbpfLog::print); }
    static void clear() { text().clear(); }
    static bool has(std::string_view words) { return text().find(words) != std::string::npos; }

    /// The last lines that say something, for an error message.
    static std::string tail()
    {
        std::istringstream lines(text());
        std::vector<std::string> kept;
        for (std::string line; std::getline(lines, line);)
            if (!line.empty())
                kept.push_back("    " + line);
        const std::size_t from = kept.size() > 8 ? kept.size() - 8 : 0;
        std::string result;
        for (std::size_t i = from; i < kept.size(); ++i)
            result += "\n" + kept[i];
        return result;
    }

private:
    static std::string& text()
    {
        static std::string log;
        return log;
    }

    static int print(libbpf_print_level level, const char* format, va_list arguments)
    {
        if (level == LIBBPF_DEBUG)
            return 0;
        char buffer[4096];
        const int length = vsnprintf(buffer, sizeof(buffer), format, arguments);
        // Its guess at any EPERM. Memory was charged to RLIMIT_MEMLOCK up to 5.10 alone, where libbpf raises it.
        if (std::strstr(buffer, "ulimit -l") != nullptr)
            return length;
        if (text().size() < 1U << 20U)
            text() += buffer;
        return length;
    }
};

constexpr int not_supported = 524; // ENOTSUPP, include/linux/errno.h: internal to the kernel, yet seen here

std::string error_text(int error)
{
    return error == not_supported ? "not supported by this kernel (ENOTSUPP)" : std::strerror(error);
}

/// Of a file; empty if it can't be read.
std::string first_line(const char* path)
{
    std::ifstream file(path);
    std::string line;
    std::getline(file, line);
    return line;
}

/// Of this kernel, as uname(2) has it: a distribution's may have more than that says.
bool is_older_than(unsigned major, unsigned minor)
{
    utsname kernel{};
    std::pair<unsigned, unsigned> version;
    return ::uname(&kernel) == 0 && std::sscanf(kernel.release, "%u.%u", &version.first, &version.second) == 2 &&
           version < std::pair(major, minor);
}

/// The memory of maps is charged to RLIMIT_MEMLOCK (up to Linux 5.10), which libbpf could not lift.
bool locked_memory_counts()
{
    rlimit limit{};
    return is_older_than(5, 11) && ::getrlimit(RLIMIT_MEMLOCK, &limit) == 0 && limit.rlim_cur != RLIM_INFINITY;
}

/// What the kernel's refusal to load or attach means, where that can be told.
std::string hint_for(int error, Backend backend)
{
    if (error == EPERM && locked_memory_counts())
        return "\n  up to Linux 5.10 the memory of its maps counts as locked, of which this process may have little: "
               "give it "
               "CAP_SYS_RESOURCE, or no such limit (ulimit -l unlimited; LimitMEMLOCK=infinity of the service or "
               "container runtime)";
    if (error == EPERM && backend == Backend::cgroup)
        return "\n  attaching to a control group takes CAP_NET_ADMIN, which before Linux 6.9 CAP_SYS_ADMIN does not "
               "contain";
    // libbpf, load_module_btfs(): for a function that this kernel does not have.
    if (LibbpfLog::has("failed to iterate BTF objects"))
        return "\n  from Linux 5.11 to 6.1 backend trace takes CAP_SYS_ADMIN, to read the types of modules; --backend "
               "cgroup does not";
    if (error == EPERM && lockdown_mode() == "confidentiality")
        return "\n  the kernel is locked down (lockdown=confidentiality): it refuses programs that read its memory; "
               "--backend cgroup works there";
    if (error == EPERM)
        return "\n  no capability is missing: the kernel itself refuses programs that read its memory, or what runs "
               "this host does (lockdown=confidentiality, a container's seccomp filter, a security module); --backend "
               "cgroup needs no such programs";
    if (error == ENOENT && access("/sys/bus/event_source/devices/kprobe", F_OK) != 0)
        return "\n  this kernel has no kprobes (CONFIG_KPROBES); --backend cgroup needs none";
    const bool lacks = error == EPERM || error == ENOENT || error == ESRCH || error == EINVAL || error == EOPNOTSUPP ||
                       error == not_supported;
    if (lacks && is_older_than(5, 10))
        return "\n  finrace takes Linux 5.10 or later";
    if (lacks && backend == Backend::trace)
        return "\n  backend trace takes a kernel that lets programs sit on its functions, as Linux does from 5.10 on "
               "with "
               "CONFIG_BPF_EVENTS and CONFIG_DEBUG_INFO_BTF; --backend cgroup does not";
    return {};
}

constexpr int events_at_once = 4096;

constexpr const char* btf_path = "/sys/kernel/btf/vmlinux";

/// The kernel's own type information.
class KernelTypes {
public:
    KernelTypes() : btf_(btf__load_vmlinux_btf())
    {
        if (libbpf_get_error(btf_) != 0)
            btf_ = nullptr;
    }
    ~KernelTypes() { btf__free(btf_); }
    KernelTypes(const KernelTypes&) = delete;
    KernelTypes& operator=(const KernelTypes&) = delete;
    KernelTypes(KernelTypes&&) = delete;
    KernelTypes& operator=(KernelTypes&&) = delete;

    explicit operator bool() const { return btf_ != nullptr; }

    /// The number of a function's parameters; nothing if the kernel has no such function.
    [[nodiscard]] std::optional<unsigned> parameters(const char* function) const
    {
        const int id = btf__find_by_name_kind(btf_, function, BTF_KIND_FUNC);
        if (id < 0)
            return std::nullopt;
        const btf_type* type = btf__type_by_id(btf_, static_cast<unsigned>(id));
        return btf_vlen(btf__type_by_id(btf_, type->type));
    }

    /// Whether tracing programs may use bpf_sk_storage_get(): Linux 5.11, which gave tcp_reset() its segment, too.
    [[nodiscard]] bool socket_storage_for_tracing() const { return parameters("tcp_reset").value_or(0) >= 2; }

    /// Whether a table may grow from within tracing programs: since 6.1, whose allocator (bpf_mem_alloc) came with it.
    [[nodiscard]] bool allocation_from_tracing() const { return parameters("bpf_mem_alloc_init").has_value(); }

private:
    btf* btf_;
};

struct LinkDeleter {
    void operator()(bpf_link* link) const { bpf_link__destroy(link); }
};
using Link = std::unique_ptr<bpf_link, LinkDeleter>;

struct RingDeleter {
    void operator()(ring_buffer* ring) const { ring_buffer__free(ring); }
};

/// A program of a backend. `function`: the kernel function it sits on, if that may be missing.
struct ProgramRow {
    const char* name;
    const char* hook;
    const char* function;
    bool required;
    const char* purpose;
};

constexpr ProgramRow trace_programs[] = {
    {"trace_send", "tcp_sendmsg_locked", "tcp_sendmsg_locked", true, "requests: send, write, MSG_ZEROCOPY, io_uring"},
    {"trace_sendpages", "do_tcp_sendpages", "do_tcp_sendpages", false, "requests: sendfile, splice, kernel TLS"},
    {"trace_state", "tp_btf/inet_sock_set_state", nullptr, true, "opens, FINs, closes"},
    {"trace_state_nested", "tp_btf/inet_sock_set_state", nullptr, true, "the same, of what interrupts another's"},
    {"trace_close", "tcp_close", "tcp_close", true, "which process closes, and when"},
    {"trace_reset", "tcp_reset", "tcp_reset", true, "RSTs with their flags and numbers"},
    {"trace_reset_bare", "tcp_reset", "tcp_reset", true, "RSTs"},
    {"trace_segment", "tcp_rcv_established", "tcp_rcv_established", true, "the RST's flags and numbers"},
    {"trace_late_segment", "tcp_rcv_state_process", "tcp_rcv_state_process", true, "segments after a close"},
    {"trace_active_reset", "tcp_send_active_reset", "tcp_send_active_reset", true, "RSTs that this host sends"},
    {"trace_syn", "tcp_conn_request", "tcp_conn_request", false, "full accept queues"},
    {"trace_last_ack", "tcp_check_req", "tcp_check_req", false, "full accept queues, at a handshake's last ACK"},
    {"trace_adopt", "iter/tcp", nullptr, true, "connections older than the tracer"},
};

constexpr ProgramRow cgroup_programs[] = {
    {"cgroup_states", "sockops", nullptr, true, "opens, FINs, closes"},
    {"cgroup_egress", "cgroup_skb/egress", nullptr, true, "requests, and RSTs that this host sends"},
    {"cgroup_ingress", "cgroup_skb/ingress", nullptr, true, "RSTs with their flags and numbers"},
    {"cgroup_connect4", "cgroup/connect4", nullptr, false, "which process connects"},
    {"cgroup_connect6", "cgroup/connect6", nullptr, false, "which process connects, IPv6"},
    {"cgroup_release", "cgroup/sock_release", nullptr, false, "that a process let go of its socket"},
};

std::uint32_t ring_size(std::uint32_t wanted)
{
    const auto page = static_cast<std::uint32_t>(sysconf(_SC_PAGESIZE));
    std::uint32_t size = page;
    while (size < wanted && size < 1U << 30U)
        size *= 2;
    return size;
}

std::uint64_t tick_ns()
{
    timespec resolution{};
    clock_getres(CLOCK_MONOTONIC_COARSE, &resolution);
    return static_cast<std::uint64_t>(resolution.tv_nsec);
}

} // namespace

std::string cgroup_root()
{
    std::ifstream mounts("/proc/self/mountinfo");
    std::string looked;
    bool is_part = false;
    for (std::string line; std::getline(mounts, line);) {
        const std::size_t separator = line.find(" - ");
        if (separator == std::string::npos)
            continue;
        std::istringstream fields(line);
        std::string skip, root, mount_point;
        fields >> skip >> skip >> skip >> root >> mount_point;
        // Not by `root`, which is that of this process's cgroup namespace.
        if (line.compare(separator + 3, 8, "cgroup2 ") == 0) {
            if (is_cgroup_root(mount_point))
                return mount_point;
            is_part = true;
        }
        if (line.compare(separator + 3, 6, "cgroup") == 0)
            looked += fmt::format("\n    {} ({}, root {})", mount_point,
                                  line.substr(separator + 3, line.find(' ', separator + 3) - separator - 3), root);
    }
    throw SetupError("no cgroup v2 hierarchy is mounted with its root; looked in /proc/self/mountinfo" +
                     (looked.empty() ? std::string(", which lists no cgroup file system") : " and found:" + looked) +
                     (is_part
                          ? "\n  a container's own part of it does not do: only its own connections would be seen; "
                            "give it the host's (podman or docker run -v /sys/fs/cgroup:/host/cgroup:ro, in "
                            "Kubernetes a hostPath volume of /sys/fs/cgroup)"
                          : "\n  mount one: mount -t cgroup2 none /sys/fs/cgroup (or below it, in a hybrid layout)"));
}

/// Everything behind LiveSource that does not depend on the backend's skeleton type.
struct LiveSource::Implementation {
    Implementation() = default;
    virtual ~Implementation() = default;
    Implementation(const Implementation&) = delete;
    Implementation& operator=(const Implementation&) = delete;
    Implementation(Implementation&&) = delete;
    Implementation& operator=(Implementation&&) = delete;

    [[nodiscard]] virtual std::uint64_t begun() const = 0;
    [[nodiscard]] virtual std::uint64_t adopted() const = 0;
    /// Runs that the kernel skipped and another program made up for.
    [[nodiscard]] virtual std::uint64_t stood_in() const { return 0; }
    [[nodiscard]] virtual int accounting() const = 0;

    static int on_sample(void* context, void* data, size_t size)
    {
        auto* self = static_cast<Implementation*>(context);
        event e;
        if (size < sizeof(e))
            return 0;
        std::memcpy(&e, data, sizeof(e));
        if (e.family == 6 && is_ipv4_mapped(e.peer_address)) {
            e.family = 4;
            ipv4_from_mapped(e.local_address);
            ipv4_from_mapped(e.peer_address);
        }
        (*self->handle)(e);
        return --self->allowance > 0 ? 0 : -ECANCELED;
    }

    void open_ring(bpf_object* object)
    {
        const int fd = bpf_object__find_map_fd_by_name(object, "events");
        ring.reset(ring_buffer__new(fd, &Implementation::on_sample, this, nullptr));
        if (!ring) {
            const int error = errno;
            throw SetupError(fmt::format("the event ring can't be mapped: {}", error_text(error)), error);
        }
        losses_fd = bpf_object__find_map_fd_by_name(object, "losses");
    }

    void add_hook(const ProgramRow& row, const std::string& prefix, std::string problem)
    {
        const bool attached = problem.empty();
        hooks.push_back({.name = prefix + row.hook,
                         .attached = attached,
                         .required = row.required,
                         .purpose = row.purpose,
                         .problem = std::move(problem)});
    }

    /// Of network namespaces: their connections older than the tracer are not taken in.
    void warn(const std::vector<std::string>& closed)
    {
        for (const std::string& what : closed)
            warnings.push_back("connections older than finrace are not taken in everywhere: " + what);
    }

    std::string backend;
    std::string attach;
    std::vector<Hook> hooks;
    std::vector<std::string> warnings;
    const std::function<void(const event&)>* handle = nullptr;
    int allowance = 0; ///< events until consume() returns
    int losses_fd = -1;
    struct Program {
        std::string name;
        int fd; ///< the object's own
        bool may_be_skipped = false;
        int kprobe_fd = -1; ///< its link's, where that is a kprobe's
    };
    std::vector<Program> programs; ///< those that stay attached
    std::vector<Link> links;
    std::unique_ptr<ring_buffer, RingDeleter> ring; // destroyed before the maps that it reads
};

namespace {

/// Owns a skeleton. Open and Destroy are the functions that bpftool generated for it.
template <typename Skeleton, Skeleton* (*Open)(), void (*Destroy)(Skeleton*)>
struct SkeletonOwner {
    SkeletonOwner() : skeleton(Open())
    {
        if (!skeleton)
            throw SetupError(fmt::format("the BPF object can't be opened: {}{}", error_text(errno), LibbpfLog::tail()));
    }
    ~SkeletonOwner() { Destroy(skeleton); }
    SkeletonOwner(const SkeletonOwner&) = delete;
    SkeletonOwner& operator=(const SkeletonOwner&) = delete;
    SkeletonOwner(SkeletonOwner&&) = delete;
    SkeletonOwner& operator=(SkeletonOwner&&) = delete;

    Skeleton* operator->() const { return skeleton; }

    void configure(const LiveOptions& options)
    {
        const std::uint32_t size = ring_size(options.ring_bytes);
        bpf_map__set_max_entries(skeleton->maps.events, size);
        skeleton->rodata->tick_ns = tick_ns();
        skeleton->rodata->follow_accepted = options.follow_accepted;
        skeleton->rodata->report_states = options.report_states;
        skeleton->rodata->wakeup_bytes = size / 4;
    }

    [[nodiscard]] bpf_program* program(const char* name) const
    {
        return bpf_object__find_program_by_name(skeleton->obj, name);
    }

    Skeleton* skeleton;
};

using StorageSkeleton = SkeletonOwner<trace_storage, trace_storage__open, trace_storage__destroy>;
using HashSkeleton = SkeletonOwner<trace_hash, trace_hash__open, trace_hash__destroy>;
using KprobeSkeleton = SkeletonOwner<trace_kprobe, trace_kprobe__open, trace_kprobe__destroy>;
using CgroupSkeleton = SkeletonOwner<cgroup_backend, cgroup_backend__open, cgroup_backend__destroy>;

/// Reads a tcp iterator to its end in the namespace that the calling thread is in. Returns an errno, or 0.
int run_iterator(int link_fd)
{
    const Descriptor iterator(bpf_iter_create(link_fd));
    if (!iterator)
        return errno;
    char buffer[256];
    for (;;) {
        const ssize_t got = read(iterator.get(), buffer, sizeof(buffer));
        if (got == 0)
            return 0;
        if (got < 0 && errno != EAGAIN && errno != EINTR)
            return errno;
    }
}

template <typename Owner>
struct TraceSource : LiveSource::Implementation {
    TraceSource(const LiveOptions& options, const KernelTypes& types, const std::string& how)
    {
        backend = "trace";
        attach = how;
        const std::string prefix = how + "/";
        const bool reset_has_segment = types.parameters("tcp_reset").value_or(0) >= 2;
        owner.configure(options);
        owner->rodata->reset_has_segment = reset_has_segment;
        owner->rodata->ticks_per_second = static_cast<std::uint32_t>(1'000'000'000 / tick_ns());
        owner->rodata->patience_ticks = owner->rodata->ticks_per_second / 2;
        owner->rodata->have_rdonly_cast = types.parameters("bpf_rdonly_cast").has_value();
        if (bpf_map* unsettled = bpf_object__find_map_by_name(owner.skeleton->obj, "unsettled"); unsettled != nullptr) {
            const bool allocates = types.allocation_from_tracing();
            bpf_map__set_max_entries(owner->maps.connections, options.max_connections);
            // Those that open or end at once, as all of an upstream's do when it goes down. What is allocated ahead is
            // memory, whether it is needed or not.
            bpf_map__set_max_entries(unsettled, std::max(1U, options.max_connections / (allocates ? 2 : 4)));
            for (bpf_map* table : {owner->maps.connections, unsettled})
                bpf_map__set_map_flags(table, allocates ? std::uint32_t{BPF_F_NO_PREALLOC} : 0U);
            // Of an LRU table each CPU takes 128 entries at once to itself (LOCAL_FREE_TARGET,
            // kernel/bpf/bpf_lru_list.c).
            const auto cpus = static_cast<std::uint32_t>(std::max(1, libbpf_num_possible_cpus()));
            bpf_map__set_max_entries(bpf_object__find_map_by_name(owner.skeleton->obj, "owner_names"),
                                     std::max(512U, 256U * cpus));
        }

        socket_owners = find_socket_owners(&warnings);
        bpf_map__set_max_entries(owner->maps.socket_owners,
                                 std::max(1U, static_cast<std::uint32_t>(socket_owners.size())));

        std::vector<const ProgramRow*> wanted;
        for (const ProgramRow& row : trace_programs) {
            const std::string name = row.name;
            const bool has_place = name == "trace_reset"                                   ? reset_has_segment
                                   : name == "trace_reset_bare" || name == "trace_segment" ? !reset_has_segment
                                                                                           : true;
            const bool exists = row.function == nullptr || types.parameters(row.function).has_value();
            bpf_program__set_autoload(owner.program(row.name), has_place && exists);
            if (!has_place)
                continue;
            if (exists)
                wanted.push_back(&row);
            else if (row.required)
                throw SetupError(fmt::format(
                    "backend trace: this kernel has no function {} to attach to ({}); --backend cgroup needs none",
                    row.function, row.purpose));
        }

        LibbpfLog::clear();
        if (const int error = -bpf_object__load_skeleton(owner->skeleton); error != 0)
            throw SetupError(fmt::format("backend trace by {}: the kernel does not load the programs: {}{}{}", how,
                                         error_text(error), LibbpfLog::tail(), hint_for(error, Backend::trace)),
                             error);
        open_ring(owner.skeleton->obj);
        for (const ProgramRow* row : wanted) {
            const bool own_prefix = std::strchr(row->hook, '/') != nullptr;
            Link link(bpf_program__attach(owner.program(row->name)));
            const int error = errno;
            if (!link && row->required)
                throw SetupError(fmt::format("backend trace: {}{} does not attach ({}): {}{}", own_prefix ? "" : prefix,
                                             row->hook, row->purpose, error_text(error),
                                             hint_for(error, Backend::trace)),
                                 error);
            add_hook(*row, own_prefix ? "" : prefix, link ? "" : error_text(error));
            if (std::strcmp(row->name, "trace_adopt") == 0)
                adopt(bpf_link__fd(link.get()));
            else if (link) {
                const int link_fd = bpf_link__fd(link.get());
                links.push_back(std::move(link));
                programs.push_back({.name = row->name,
                                    .fd = bpf_program__fd(owner.program(row->name)),
                                    // Where this one is skipped, trace_state ran.
                                    .may_be_skipped = std::strcmp(row->name, "trace_state_nested") != 0,
                                    .kprobe_fd = how == "kprobe" && !own_prefix ? link_fd : -1});
            }
        }
    }

    /// Everything else is attached by now: what opens or ends meanwhile is seen by those hooks.
    void adopt(int link_fd)
    {
        const int map = bpf_map__fd(owner->maps.socket_owners);
        for (const auto& [inode, pid] : socket_owners)
            bpf_map_update_elem(map, &inode, &pid, BPF_NOEXIST);
        std::set<int> errors;
        warn(in_each_network_namespace([&] {
            if (const int error = run_iterator(link_fd); error != 0)
                errors.insert(error);
        }));
        for (const auto& [inode, pid] : socket_owners)
            bpf_map_delete_elem(map, &inode);
        socket_owners.clear();
        for (const int error : errors)
            warnings.push_back(fmt::format("connections older than the tracer can't be listed: {}", error_text(error)));
    }

    [[nodiscard]] std::uint64_t begun() const override { return owner->bss->connections_begun; }
    [[nodiscard]] std::uint64_t adopted() const override { return owner->bss->connections_adopted; }
    [[nodiscard]] std::uint64_t stood_in() const override { return owner->bss->states_stood_in; }
    [[nodiscard]] int accounting() const override
    {
        const bool in_sockets = bpf_map__type(owner->maps.connections) == BPF_MAP_TYPE_SK_STORAGE;
        return in_sockets ? bpf_map__fd(owner->maps.connections) : -1;
    }

    ~TraceSource() override
    {
        ring.reset();
        links.clear();
    }
    TraceSource(const TraceSource&) = delete;
    TraceSource& operator=(const TraceSource&) = delete;
    TraceSource(TraceSource&&) = delete;
    TraceSource& operator=(TraceSource&&) = delete;

    Owner owner;
    SocketOwners socket_owners; ///< until the connections older than the tracer are taken in
};

struct CgroupSource : LiveSource::Implementation {
    /// `with_owner`, `with_release`: whether the kernel lets those programs use the helpers they need.
    CgroupSource(const LiveOptions& options, bool with_owner, bool with_release)
    {
        backend = "cgroup";
        const std::string root = cgroup_root();
        owner.configure(options);
        owner->rodata->have_release_hook = with_release;
        bpf_program__set_autoload(owner->progs.cgroup_connect4, with_owner);
        bpf_program__set_autoload(owner->progs.cgroup_connect6, with_owner);
        bpf_program__set_autoload(owner->progs.cgroup_release, with_release);

        LibbpfLog::clear();
        if (const int error = -bpf_object__load_skeleton(owner->skeleton); error != 0)
            throw SetupError(fmt::format("backend cgroup: the kernel does not load the programs: {}{}{}",
                                         error_text(error), LibbpfLog::tail(), hint_for(error, Backend::cgroup)),
                             error);
        const Descriptor cgroup(open(root.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
        if (!cgroup)
            throw SetupError(fmt::format("backend cgroup: {}: {}", root, error_text(errno)));
        open_ring(owner.skeleton->obj);
        for (const ProgramRow& row : cgroup_programs) {
            bpf_program* program = owner.program(row.name);
            if (!bpf_program__autoload(program)) {
                add_hook(row, "", "this kernel offers no process or socket storage there");
                continue;
            }
            Link link(bpf_program__attach_cgroup(program, cgroup.get()));
            const int error = errno;
            if (!link && row.required)
                throw SetupError(fmt::format("backend cgroup: {} does not attach to {} ({}): {}{}", row.hook, root,
                                             row.purpose, error_text(error), hint_for(error, Backend::cgroup)),
                                 error);
            add_hook(row, "", link ? "" : error_text(error));
            if (link) {
                links.push_back(std::move(link));
                programs.push_back({.name = row.name, .fd = bpf_program__fd(program)});
            }
        }
        adopt(options);
    }

    /// The packet programs take a connection in when they first see it; here they are told which ones to.
    void adopt(const LiveOptions& options)
    {
        struct Older {
            ListedSocket socket;
            bool accepted;
        };
        std::vector<Older> older;
        int refused = 0;
        warn(in_each_network_namespace([&] {
            std::vector<ListedSocket> sockets;
            std::set<std::uint16_t> listening;
            if (!list_tcp_sockets([&](const ListedSocket& s) { sockets.push_back(s); })) {
                refused = errno;
                return;
            }
            for (const ListedSocket& s : sockets)
                if (s.state == TCP_STATE_LISTEN)
                    listening.insert(s.local_port);
            for (const ListedSocket& s : sockets)
                if (s.state != TCP_STATE_LISTEN)
                    older.push_back({s, listening.contains(s.local_port)});
        }));
        if (refused != 0)
            warnings.push_back(
                fmt::format("connections older than the tracer can't be listed: {}", error_text(refused)));
        if (!options.follow_accepted)
            std::erase_if(older, [](const Older& o) { return o.accepted; });
        const SocketOwners owners = find_socket_owners(&warnings);
        if (older.empty())
            return;

        const int map = bpf_map__fd(owner->maps.adoptables);
        std::int64_t added = 0;
        for (const auto& [socket, accepted] : older) {
            adoptable entry{};
            entry.last_receive_ns = socket.last_receive_ns;
            entry.last_send_ns = socket.last_send_ns;
            entry.bytes_received = socket.bytes_received;
            entry.flags = accepted ? 0U : std::uint32_t{CONNECTION_CLIENT};
            if (socket.state == TCP_STATE_CLOSE_WAIT || socket.state == TCP_STATE_LAST_ACK ||
                socket.state == TCP_STATE_CLOSING)
                entry.flags |= CONNECTION_PEER_FIN;
            if (socket.state == TCP_STATE_FIN_WAIT1 || socket.state == TCP_STATE_FIN_WAIT2 ||
                socket.state == TCP_STATE_LAST_ACK || socket.state == TCP_STATE_CLOSING)
                entry.flags |= CONNECTION_LOCAL_FIN;
            if (const auto found = owners.find(socket.inode); found != owners.end())
                entry.pid = found->second;
            if (bpf_map_update_elem(map, &socket.cookie, &entry, BPF_NOEXIST) == 0)
                ++added;
        }
        listed = static_cast<std::uint64_t>(added);
        owner->bss->adoptables_left = added;
    }

    [[nodiscard]] std::uint64_t begun() const override { return owner->bss->connections_begun; }
    [[nodiscard]] std::uint64_t adopted() const override { return listed; }
    [[nodiscard]] int accounting() const override { return bpf_map__fd(owner->maps.connections); }

    ~CgroupSource() override
    {
        ring.reset();
        links.clear();
    }
    CgroupSource(const CgroupSource&) = delete;
    CgroupSource& operator=(const CgroupSource&) = delete;
    CgroupSource(CgroupSource&&) = delete;
    CgroupSource& operator=(CgroupSource&&) = delete;

    CgroupSkeleton owner;
    std::uint64_t listed = 0;
};

using Implementation = LiveSource::Implementation;

std::unique_ptr<Implementation> open_trace(const LiveOptions& options, Attach how)
{
    const KernelTypes types;
    if (!types)
        throw SetupError(fmt::format("backend trace: this kernel has no type information ({} is missing: "
                                     "CONFIG_DEBUG_INFO_BTF); --backend cgroup needs none",
                                     btf_path));
    if (how == Attach::kprobe)
        return std::make_unique<TraceSource<KprobeSkeleton>>(options, types, "kprobe");
    if (types.socket_storage_for_tracing())
        return std::make_unique<TraceSource<StorageSkeleton>>(options, types, "fentry");
    return std::make_unique<TraceSource<HashSkeleton>>(options, types, "fentry");
}

std::unique_ptr<Implementation> open_cgroup(const LiveOptions& options)
{
    std::optional<SetupError> first;
    for (const auto& [with_owner, with_release] :
         {std::pair{true, true}, {false, true}, {true, false}, {false, false}}) {
        try {
            return std::make_unique<CgroupSource>(options, with_owner, with_release);
        } catch (const SetupError& error) {
            if (!first)
                first = error;
        }
    }
    throw *first;
}

/// The first of the ways to attach that works. Throws SetupError with all that was tried.
std::unique_ptr<Implementation> open_first(const LiveOptions& options)
{
    std::string problems;
    int number = 0; ///< of one that may pass, or of the first, which is the best way
    const auto attempt = [&](const auto& open_backend) -> std::unique_ptr<Implementation> {
        try {
            return open_backend();
        } catch (const SetupError& error) {
            if (problems.empty() || error.error == ENOMEM)
                number = error.error;
            problems += (problems.empty() ? "" : "\n") + std::string(error.what());
            return nullptr;
        }
    };
    // A lesser way than the first that was tried: whoever wonders what is missing should read why.
    const auto instead = [&](std::unique_ptr<Implementation> source, const char* way) {
        if (!problems.empty())
            source->warnings.push_back(fmt::format("{}; backend {} works here and is taken (finrace doctor tells all)",
                                                   problems.substr(0, problems.find('\n')), way));
        return source;
    };
    if (options.backend != Backend::cgroup) {
        if (options.attach != Attach::kprobe)
            if (auto source = attempt([&] { return open_trace(options, Attach::fentry); }))
                return source;
        if (options.attach != Attach::fentry)
            if (auto source = attempt([&] { return open_trace(options, Attach::kprobe); }))
                return instead(std::move(source), "trace by kprobe");
    }
    if (options.backend != Backend::trace && options.attach == Attach::automatic)
        if (auto source = attempt([&] { return open_cgroup(options); }))
            return instead(std::move(source), "cgroup");
    throw SetupError(problems, number);
}

} // namespace

LiveSource::LiveSource(const LiveOptions& options)
{
    LibbpfLog::install();
    const std::optional<std::string> problem = take_host_names();
    implementation_ = open_first(options);
    if (problem)
        implementation_->warnings.push_back(*problem);
}

LiveSource::~LiveSource() = default;

int LiveSource::wakeup_fd() const
{
    return ring_buffer__epoll_fd(implementation_->ring.get());
}

int LiveSource::accounting() const
{
    return implementation_->accounting();
}

bool LiveSource::consume(const std::function<void(const event&)>& handle)
{
    implementation_->handle = &handle;
    implementation_->allowance = events_at_once;
    const int result = ring_buffer__consume(implementation_->ring.get());
    implementation_->handle = nullptr;
    return result == -ECANCELED;
}

namespace {

std::string host_name()
{
    std::string name(256, '\0');
    if (::gethostname(name.data(), name.size() - 1) != 0)
        return "localhost";
    name.resize(std::strlen(name.c_str()));
    return name;
}

/// One for each CPU; none if the kernel does not hand them out.
std::vector<loss_counters> losses_by_cpu(const LiveSource::Implementation& implementation)
{
    const int cpus = libbpf_num_possible_cpus();
    std::vector<loss_counters> each(cpus > 0 ? static_cast<std::size_t>(cpus) : 0);
    const std::uint32_t zero = 0;
    if (each.empty() || bpf_map_lookup_elem(implementation.losses_fd, &zero, each.data()) != 0)
        each.clear();
    return each;
}

/// All zeros if the kernel does not tell.
bpf_prog_info info_of(int program)
{
    bpf_prog_info info{};
    std::uint32_t size = sizeof(info);
    if (bpf_obj_get_info_by_fd(program, &info, &size) != 0)
        return {};
    return info;
}

/// How often a kprobe hit while its CPU was in another's handler: kprobe_ftrace_handler() and reenter_kprobe() count
/// it, and leave its handler out. 0 where the kernel does not tell (before Linux 6.7, commit 3acf8ace6823).
std::uint64_t missed_hits(int kprobe_link)
{
    /// What that commit has made of struct bpf_link_info.
    struct {
        std::uint32_t link_type, link_id, program_id, padding;
        std::uint32_t event_type, event_padding;
        std::uint64_t function_name;
        std::uint32_t name_bytes, offset;
        std::uint64_t address, missed;
    } info{};
    constexpr std::uint32_t perf_event_link = 7; // BPF_LINK_TYPE_PERF_EVENT
    constexpr std::uint32_t kprobe_event = 3;    // BPF_PERF_EVENT_KPROBE
    std::uint32_t size = sizeof(info);
    const bool told =
        kprobe_link >= 0 && bpf_obj_get_info_by_fd(kprobe_link, &info, &size) == 0 && size == sizeof(info);
    return told && info.link_type == perf_event_link && info.event_type == kprobe_event ? info.missed : 0;
}

loss_counters sum_losses(const LiveSource::Implementation& implementation)
{
    loss_counters sum{};
    for (const loss_counters& one : losses_by_cpu(implementation)) {
        for (std::size_t i = 0; i < LOSS_PLACES; ++i)
            sum.by_place[i] += one.by_place[i];
        for (std::size_t i = 0; i < EVENT_KINDS; ++i)
            sum.by_kind[i] += one.by_kind[i];
    }
    std::uint64_t skipped = 0;
    std::uint64_t missed = 0;
    for (const auto& program : implementation.programs) {
        if (program.may_be_skipped)
            skipped += info_of(program.fd).recursion_misses;
        missed += missed_hits(program.kprobe_fd);
    }
    sum.by_place[LOSS_PROGRAM_SKIPPED] = skipped - std::min(skipped, implementation.stood_in()) + missed;
    return sum;
}

} // namespace

SourceFacts LiveSource::facts() const
{
    SourceFacts facts{.host_name = host_name(),
                      .backend = implementation_->backend,
                      .attach = implementation_->attach,
                      .tells_outcomes = implementation_->backend == "trace",
                      .missing = {}};
    for (const Hook& hook : implementation_->hooks)
        if (!hook.attached)
            facts.missing.push_back(hook);
    return facts;
}

SourceCounts LiveSource::counts() const
{
    return {.connections_begun = implementation_->begun(),
            .connections_adopted = implementation_->adopted(),
            .losses = sum_losses(*implementation_)};
}

bool LiveSource::counts_losses() const
{
    return !losses_by_cpu(*implementation_).empty();
}

std::vector<ProgramRuns> LiveSource::program_runs() const
{
    std::vector<ProgramRuns> all;
    for (const auto& program : implementation_->programs) {
        const bpf_prog_info info = info_of(program.fd);
        all.push_back({.name = program.name, .runs = info.run_cnt, .ns = info.run_time_ns});
    }
    return all;
}

const std::vector<Hook>& LiveSource::hooks() const
{
    return implementation_->hooks;
}

const std::vector<std::string>& LiveSource::warnings() const
{
    return implementation_->warnings;
}

namespace {

/// What the kernel keeps from a backend whose hooks are all attached.
std::vector<std::string> unseen_by(Backend backend, Attach attach)
{
    if (backend == Backend::cgroup)
        return {"the process of a connection that this host accepted",
                "bytes that a process left unread, ICMP errors, the network namespace",
                "a write that fails before a segment leaves",
                "of a connection older than finrace: an end that comes after this host's close()"};
    std::vector<std::string> unseen;
    // mptcp_sendmsg() hands its data to the subflows' sockets without tcp_sendmsg_locked().
    if (first_line("/proc/sys/net/mptcp/enabled") == "1")
        unseen.emplace_back("requests on MPTCP connections: their sends pass the send hook by (net.mptcp.enabled=1)");
    // tcp_sendmsg_fastopen(): the data leaves with the SYN. TFO_CLIENT_ENABLE, include/net/tcp.h.
    if ((std::atoi(first_line("/proc/sys/net/ipv4/tcp_fastopen").c_str()) & 1) != 0)
        unseen.emplace_back(
            "requests inside a SYN, where a process asks for TCP Fast Open (net.ipv4.tcp_fastopen=1 or 3)");
    if (attach == Attach::kprobe && is_older_than(6, 7))
        unseen.emplace_back(
            "what comes while a CPU is in another kprobe's handler, uncounted (Linux counts it from 6.7 on)");
    return unseen;
}

} // namespace

std::vector<BackendReport> examine_backends()
{
    struct Way {
        Backend backend;
        Attach attach;
        const char* backend_name;
        const char* attach_name;
    };
    constexpr Way ways[] = {
        {Backend::trace, Attach::fentry, "trace", "fentry"},
        {Backend::trace, Attach::kprobe, "trace", "kprobe"},
        {Backend::cgroup, Attach::automatic, "cgroup", ""},
    };
    std::vector<BackendReport> reports;
    for (const Way& way : ways) {
        BackendReport report{.backend = way.backend_name,
                             .attach = way.attach_name,
                             .works = false,
                             .problem = {},
                             .hooks = {},
                             .unseen = {},
                             .warnings = {}};
        try {
            const LiveSource source({.backend = way.backend, .attach = way.attach, .ring_bytes = 4096});
            report.works = true;
            report.hooks = source.hooks();
            report.unseen = unseen_by(way.backend, way.attach);
            report.warnings = source.warnings();
        } catch (const SetupError& error) {
            report.problem = error.what();
        }
        reports.push_back(std::move(report));
    }
    return reports;
}

} // namespace finrace
