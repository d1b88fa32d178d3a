// delay-line: two network namespaces joined by a wire with a chosen delay, in user space.
//
// Each namespace gets one TUN device; this process reads a packet from one, holds it for the one-way delay and writes
// it to the other. That needs nothing but TUN, so it works on kernels without netem, and a black hole can be opened and
// closed at a chosen moment (control socket), for everything or for one TCP port. A packet is judged (black hole, loss)
// when it enters the line; what is already under way arrives. Order is kept: FIFO for each direction.
//
// Clean-up is done by a small guardian process that waits for this one's end, so that the namespaces are removed
// however the line ends, SIGKILL included.

#define FMT_HEADER_ONLY
#include <fmt/format.h>

#include <CLI/CLI.hpp>

#include <arpa/inet.h>
#include <fcntl.h>
#include <linux/if_tun.h>
#include <net/if.h>
#include <net/route.h>
#include <netinet/in.h>
#include <poll.h>
#include <sched.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/timerfd.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <charconv>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <deque>
#include <optional>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace {

constexpr std::int64_t nanos_per_second = 1'000'000'000;
constexpr std::int64_t max_delay = 60 * nanos_per_second;
constexpr std::size_t queue_limit =
    100'000; // packets under way in one direction; beyond it they are dropped and counted
constexpr std::size_t max_packet = 65'536;
constexpr int batch_size = 256; // packets read from one device before due packets get their turn
constexpr std::size_t max_controllers = 64;
constexpr std::size_t max_control_line = 256;
constexpr int transmit_queue = 10'000; // TUN's own 500 overflows when many connections burst at once
constexpr std::int64_t child_patience = 5 * nanos_per_second;
constexpr std::int64_t address_patience = 5 * nanos_per_second;
constexpr const char* device_name = "line";
constexpr const char* namespace_folder = "/run/netns";

struct Failure : std::runtime_error {
    using std::runtime_error::runtime_error;
};

[[noreturn]] void fail_errno(const std::string& what, const std::string& remedy = "")
{
    const int error = errno;
    throw Failure(fmt::format("{}: {}{}{}", what, std::strerror(error), remedy.empty() ? "" : ": ", remedy));
}

class Fd {
public:
    Fd() = default;
    explicit Fd(int fd) : fd_(fd) {}
    Fd(Fd&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
    Fd& operator=(Fd&& other) noexcept
    {
        if (this != &other) {
            reset();
            fd_ = std::exchange(other.fd_, -1);
        }
        return *this;
    }
    Fd(const Fd&) = delete;
    Fd& operator=(const Fd&) = delete;
    ~Fd() { reset(); }
    [[nodiscard]] int get() const { return fd_; }
    void reset()
    {
        if (fd_ >= 0)
            close(fd_);
        fd_ = -1;
    }

private:
    int fd_ = -1;
};

std::int64_t now()
{
    timespec time{};
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * nanos_per_second + time.tv_nsec;
}

// ---- values of flags and commands
// ------------------------------------------------------------------------------------

constexpr const char* duration_forms = "a number with us, ms or s, at most 60s: 20ms, 1.5s, 500us";
constexpr const char* loss_forms = "a share from 0 to 100 with %: 0.5%";
constexpr const char* drop_forms = "left-to-right, right-to-left, both or none";

std::optional<double> parse_number(std::string_view text)
{
    double value = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value, std::chars_format::fixed);
    if (error != std::errc{} || end != text.data() + text.size() || value < 0)
        return std::nullopt;
    return value;
}

std::optional<std::int64_t> parse_duration(std::string_view text)
{
    if (text == "0")
        return 0;
    static constexpr std::array<std::pair<std::string_view, double>, 3> units{{{"us", 1e3}, {"ms", 1e6}, {"s", 1e9}}};
    for (const auto& [unit, nanos] : units) {
        if (!text.ends_with(unit))
            continue;
        const auto value = parse_number(text.substr(0, text.size() - unit.size()));
        if (!value || *value * nanos > static_cast<double>(max_delay))
            return std::nullopt;
        return static_cast<std::int64_t>(*value * nanos);
    }
    return std::nullopt;
}

std::optional<double> parse_loss(std::string_view text)
{
    if (text == "0")
        return 0.0;
    if (!text.ends_with('%'))
        return std::nullopt;
    const auto value = parse_number(text.substr(0, text.size() - 1));
    if (!value || *value > 100)
        return std::nullopt;
    return *value / 100;
}

struct Drop {
    bool left_to_right = false;
    bool right_to_left = false;
};

std::optional<Drop> parse_drop(std::string_view text)
{
    if (text == "none")
        return Drop{};
    if (text == "left-to-right")
        return Drop{.left_to_right = true, .right_to_left = false};
    if (text == "right-to-left")
        return Drop{.left_to_right = false, .right_to_left = true};
    if (text == "both")
        return Drop{.left_to_right = true, .right_to_left = true};
    return std::nullopt;
}

struct Options {
    std::string left = fmt::format("finrace-left-{}", getpid());
    std::string right = fmt::format("finrace-right-{}", getpid());
    std::string left_address = "10.77.0.1";
    std::string right_address = "10.77.0.2";
    std::string left_address6 = "fd77::1";
    std::string right_address6 = "fd77::2";
    std::int64_t delay = 20'000'000;
    double loss = 0;
    Drop drop;
    std::uint64_t seed = 1;
    std::string control;
    bool verbose = false;
    std::vector<char*> command; // null-terminated when not empty
};

// ---- the guardian: removes what was made, whatever ends the line
// -------------------------------------------------------

void remove_leftover(std::string_view line)
{
    if (line.starts_with("netns ")) {
        const std::string path = fmt::format("{}/{}", namespace_folder, line.substr(6));
        umount2(path.c_str(), MNT_DETACH);
        unlink(path.c_str());
    } else if (line.starts_with("socket ")) {
        unlink(std::string(line.substr(7)).c_str());
    }
}

class Guardian {
public:
    Guardian()
    {
        std::array<int, 2> ends{};
        if (pipe2(ends.data(), O_CLOEXEC) != 0)
            fail_errno("pipe");
        Fd reader(ends[0]);
        writer_ = Fd(ends[1]);
        pid_ = fork();
        if (pid_ < 0)
            fail_errno("fork");
        if (pid_ == 0)
            guard(std::move(reader));
    }
    Guardian(const Guardian&) = delete;
    Guardian& operator=(const Guardian&) = delete;
    ~Guardian()
    {
        writer_.reset();
        waitpid(pid_, nullptr, 0);
    }
    // Told before the thing is made, so that there is no moment at which it would be left behind.
    void watch(const std::string& line) const
    {
        const std::string text = line + "\n";
        if (write(writer_.get(), text.data(), text.size()) != static_cast<ssize_t>(text.size()))
            fail_errno("guardian pipe");
    }

private:
    [[noreturn]] void guard(Fd reader)
    {
        writer_.reset();
        setsid(); // a signal to the whole process group must not take the guardian as well
        sigset_t all;
        sigfillset(&all);
        sigprocmask(SIG_SETMASK, &all, nullptr);
        close(STDIN_FILENO);
        close(STDOUT_FILENO);
        std::string text;
        std::array<char, 512> part{};
        for (;;) {
            const ssize_t got = read(reader.get(), part.data(), part.size());
            if (got < 0 && errno == EINTR)
                continue;
            if (got <= 0)
                break;
            text.append(part.data(), static_cast<std::size_t>(got));
        }
        for (std::size_t start = 0; start < text.size();) {
            const std::size_t end = text.find('\n', start);
            if (end == std::string::npos)
                break;
            remove_leftover(std::string_view(text).substr(start, end - start));
            start = end + 1;
        }
        _exit(0);
    }

    Fd writer_;
    pid_t pid_ = -1;
};

// ---- one end of the line: a namespace with a TUN device
// ----------------------------------------------------------------

void set_kernel_knob(const std::string& path, const char* value)
{
    // Best effort: a knob that this kernel does not have needs no setting.
    Fd file(open(path.c_str(), O_WRONLY | O_CLOEXEC));
    if (file.get() < 0)
        return;
    if (write(file.get(), value, std::strlen(value)) < 0 && errno != EINVAL)
        fail_errno(path);
}

void share_namespace_folder()
{
    // As `ip netns` does it: a shared mount, so that mount namespaces made later see names come and go.
    if (mkdir(namespace_folder, 0755) != 0 && errno != EEXIST)
        fail_errno(namespace_folder);
    if (mount("", namespace_folder, "none", MS_SHARED | MS_REC, nullptr) == 0)
        return;
    if (errno != EINVAL)
        fail_errno(fmt::format("mount --make-shared {}", namespace_folder), "run as root");
    if (mount(namespace_folder, namespace_folder, "none", MS_BIND | MS_REC, nullptr) != 0) {
        fail_errno(fmt::format("mount --bind {}", namespace_folder));
    }
    if (mount("", namespace_folder, "none", MS_SHARED | MS_REC, nullptr) != 0) {
        fail_errno(fmt::format("mount --make-shared {}", namespace_folder));
    }
}

ifreq interface_request(const char* device)
{
    ifreq request{};
    std::snprintf(request.ifr_name, sizeof request.ifr_name, "%s", device);
    return request;
}

void bring_up(int socket4, const char* device)
{
    ifreq request = interface_request(device);
    if (ioctl(socket4, SIOCGIFFLAGS, &request) != 0)
        fail_errno(fmt::format("{}: flags", device));
    request.ifr_flags = static_cast<short>(request.ifr_flags | IFF_UP);
    if (ioctl(socket4, SIOCSIFFLAGS, &request) != 0)
        fail_errno(fmt::format("{}: up", device));
}

void set_address4(int socket4, const std::string& address)
{
    ifreq request = interface_request(device_name);
    sockaddr_in value{};
    value.sin_family = AF_INET;
    inet_pton(AF_INET, address.c_str(), &value.sin_addr);
    std::memcpy(&request.ifr_addr, &value, sizeof value);
    if (ioctl(socket4, SIOCSIFADDR, &request) != 0)
        fail_errno(fmt::format("address {}", address));
}

void set_default_route4(int socket4)
{
    // A default route, not one to the peer alone: any other address goes into the line and dies at the far end.
    rtentry route{};
    sockaddr_in any{};
    any.sin_family = AF_INET;
    std::memcpy(&route.rt_dst, &any, sizeof any);
    std::memcpy(&route.rt_genmask, &any, sizeof any);
    std::string device = device_name;
    route.rt_dev = device.data();
    route.rt_flags = RTF_UP;
    if (ioctl(socket4, SIOCADDRT, &route) != 0)
        fail_errno("IPv4 default route");
}

// An address is tentative for a moment even where no neighbour could contest it, and cannot be bound to until then.
void wait_for_address6(int socket6, const std::string& address)
{
    sockaddr_in6 value{};
    value.sin6_family = AF_INET6;
    inet_pton(AF_INET6, address.c_str(), &value.sin6_addr);
    for (const std::int64_t deadline = now() + address_patience; now() < deadline;) {
        if (bind(socket6, reinterpret_cast<const sockaddr*>(&value), sizeof value) == 0)
            return;
        if (errno != EADDRNOTAVAIL)
            fail_errno(fmt::format("bind to {}", address));
        poll(nullptr, 0, 1);
    }
    throw Failure(fmt::format("address {}: still tentative after 5 s: is IPv6 working on this host?", address));
}

// linux/ipv6.h clashes with netinet/in.h, so the one structure wanted from it is spelled out.
struct Ipv6AddressRequest {
    in6_addr address;
    std::uint32_t prefix;
    int index;
};

void set_address6(const std::string& address)
{
    Fd socket6(socket(AF_INET6, SOCK_DGRAM | SOCK_CLOEXEC, 0));
    if (socket6.get() < 0)
        fail_errno("IPv6 socket", "this kernel has no IPv6: give --left-address6 none --right-address6 none");
    Ipv6AddressRequest request{};
    inet_pton(AF_INET6, address.c_str(), &request.address);
    request.prefix = 128;
    request.index = static_cast<int>(if_nametoindex(device_name));
    if (ioctl(socket6.get(), SIOCSIFADDR, &request) != 0) {
        fail_errno(fmt::format("address {}", address), "without IPv6, give --left-address6 none --right-address6 none");
    }
    in6_rtmsg route{};
    route.rtmsg_metric = 1;
    route.rtmsg_flags = RTF_UP;
    route.rtmsg_ifindex = request.index;
    if (ioctl(socket6.get(), SIOCADDRT, &route) != 0)
        fail_errno("IPv6 default route");
    wait_for_address6(socket6.get(), address);
}

Fd make_end(const Guardian& guardian, const std::string& name, const std::string& address, const std::string& address6)
{
    Fd home(open("/proc/self/ns/net", O_RDONLY | O_CLOEXEC));
    if (home.get() < 0)
        fail_errno("/proc/self/ns/net");
    const std::string path = fmt::format("{}/{}", namespace_folder, name);
    Fd placeholder(open(path.c_str(), O_RDONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0));
    if (placeholder.get() < 0) {
        fail_errno(
            path,
            fmt::format("choose another name (--left, --right), or `ip netns delete {}` if it is left over", name));
    }
    guardian.watch("netns " + name);
    if (unshare(CLONE_NEWNET) != 0)
        fail_errno("new network namespace", "run as root");
    if (mount("/proc/self/ns/net", path.c_str(), "none", MS_BIND, nullptr) != 0)
        fail_errno(fmt::format("mount {}", path));

    // A TUN device belongs to the namespace in which /dev/net/tun was opened.
    Fd tun(open("/dev/net/tun", O_RDWR | O_CLOEXEC | O_NONBLOCK));
    if (tun.get() < 0)
        fail_errno("/dev/net/tun", "load the module: modprobe tun");
    ifreq request = interface_request(device_name);
    request.ifr_flags = IFF_TUN | IFF_NO_PI;
    if (ioctl(tun.get(), TUNSETIFF, &request) != 0)
        fail_errno("TUN device");
    // No offloads: packets leave the kernel whole and with their checksums filled in.
    if (ioctl(tun.get(), TUNSETOFFLOAD, 0) != 0)
        fail_errno("TUN offloads");

    Fd socket4(socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0));
    if (socket4.get() < 0)
        fail_errno("IPv4 socket");
    request = interface_request(device_name);
    request.ifr_qlen = transmit_queue;
    if (ioctl(socket4.get(), SIOCSIFTXQLEN, &request) != 0)
        fail_errno("TUN queue length");
    // A host with forwarding on hands that to new namespaces: packets for unknown addresses would bounce in the line.
    set_kernel_knob("/proc/sys/net/ipv4/ip_forward", "0");
    set_kernel_knob("/proc/sys/net/ipv6/conf/all/forwarding", "0");
    // No link-local address and no router solicitations: the line carries only what its users send.
    set_kernel_knob(fmt::format("/proc/sys/net/ipv6/conf/{}/addr_gen_mode", device_name), "1");
    set_kernel_knob(fmt::format("/proc/sys/net/ipv6/conf/{}/accept_dad", device_name), "0");
    bring_up(socket4.get(), "lo");
    set_address4(socket4.get(), address);
    bring_up(socket4.get(), device_name);
    set_default_route4(socket4.get());
    if (address6 != "none")
        set_address6(address6);

    if (setns(home.get(), CLONE_NEWNET) != 0)
        fail_errno("return to the first namespace");
    return tun;
}

// ---- the wire
// -----------------------------------------------------------------------------------------------------------

struct Packet {
    std::int64_t due = 0;
    std::vector<std::uint8_t> bytes;
};

struct Direction {
    const char* name = "";
    int from = -1;
    int to = -1;
    bool drop = false;
    std::set<std::uint16_t> dropped_ports{};
    std::deque<Packet> under_way{};
    std::uint64_t forwarded = 0;
    std::uint64_t dropped = 0;
    std::int64_t late_total = 0;
    std::int64_t late_max = 0;
};

struct Ports {
    std::uint16_t source = 0;
    std::uint16_t destination = 0;
};

std::optional<Ports> tcp_ports(const std::uint8_t* bytes, std::size_t size)
{
    std::size_t offset = 0;
    if (size >= 20 && bytes[0] >> 4 == 4) {
        const bool first_fragment = (bytes[6] & 0x1f) == 0 && bytes[7] == 0;
        if (bytes[9] != IPPROTO_TCP || !first_fragment)
            return std::nullopt;
        offset = static_cast<std::size_t>(bytes[0] & 0xf) * 4;
    } else if (size >= 40 && bytes[0] >> 4 == 6) {
        if (bytes[6] != IPPROTO_TCP)
            return std::nullopt;
        offset = 40;
    } else {
        return std::nullopt;
    }
    if (size < offset + 4)
        return std::nullopt;
    const auto port = [&](std::size_t at) { return static_cast<std::uint16_t>(bytes[at] << 8 | bytes[at + 1]); };
    return Ports{.source = port(offset), .destination = port(offset + 2)};
}

class Wire {
public:
    Wire(const Options& options, int left, int right)
        : delay_(options.delay), loss_(options.loss), random_(options.seed)
    {
        right_bound_.name = "left-to-right";
        right_bound_.from = left;
        right_bound_.to = right;
        right_bound_.drop = options.drop.left_to_right;
        left_bound_.name = "right-to-left";
        left_bound_.from = right;
        left_bound_.to = left;
        left_bound_.drop = options.drop.right_to_left;
    }

    void take_from_left() { take(right_bound_); }
    void take_from_right() { take(left_bound_); }

    void deliver_due()
    {
        deliver_due(right_bound_);
        deliver_due(left_bound_);
    }

    [[nodiscard]] std::optional<std::int64_t> next_due() const
    {
        std::optional<std::int64_t> next;
        for (const Direction* direction : {&right_bound_, &left_bound_}) {
            if (direction->under_way.empty())
                continue;
            const std::int64_t due = direction->under_way.front().due;
            next = next ? std::min(*next, due) : due;
        }
        return next;
    }

    std::string obey(std::string_view line)
    {
        std::vector<std::string_view> words;
        for (std::size_t start = 0; start < line.size();) {
            const std::size_t end = std::min(line.find(' ', start), line.size());
            if (end > start)
                words.push_back(line.substr(start, end - start));
            start = end + 1;
        }
        if (words.size() == 1 && words[0] == "stats")
            return "ok " + stats();
        if (words.size() == 2 && words[0] == "delay") {
            const auto value = parse_duration(words[1]);
            if (!value)
                return fmt::format("error delay '{}': use {}", words[1], duration_forms);
            delay_ = *value;
            return fmt::format("ok delay {}us", delay_ / 1000);
        }
        if (words.size() == 2 && words[0] == "loss") {
            const auto value = parse_loss(words[1]);
            if (!value)
                return fmt::format("error loss '{}': use {}", words[1], loss_forms);
            loss_ = *value;
            return fmt::format("ok loss {}%", loss_ * 100);
        }
        if ((words.size() == 2 || (words.size() == 4 && words[2] == "port")) && words[0] == "drop") {
            const auto value = parse_drop(words[1]);
            if (!value)
                return fmt::format("error drop '{}': use {}", words[1], drop_forms);
            if (words.size() == 2) {
                right_bound_.drop = value->left_to_right;
                left_bound_.drop = value->right_to_left;
                if (words[1] == "none") {
                    right_bound_.dropped_ports.clear();
                    left_bound_.dropped_ports.clear();
                }
                return fmt::format("ok drop {}", words[1]);
            }
            std::uint16_t port = 0;
            const auto [end, error] = std::from_chars(words[3].data(), words[3].data() + words[3].size(), port);
            if (error != std::errc{} || end != words[3].data() + words[3].size() || port == 0) {
                return fmt::format("error port '{}': use 1 to 65535", words[3]);
            }
            set_port(right_bound_, port, value->left_to_right);
            set_port(left_bound_, port, value->right_to_left);
            return fmt::format("ok drop {} port {}", words[1], port);
        }
        return fmt::format("error command '{}': use drop DIRECTION [port N], delay TIME, loss SHARE or stats", line);
    }

    [[nodiscard]] std::string stats() const
    {
        std::string text;
        for (const Direction* direction : {&right_bound_, &left_bound_}) {
            const std::int64_t mean =
                direction->forwarded == 0 ? 0 : direction->late_total / static_cast<std::int64_t>(direction->forwarded);
            text += fmt::format("{}{} forwarded={} dropped={} under_way={} late_mean_us={} late_max_us={}",
                                text.empty() ? "" : " ", direction->name, direction->forwarded, direction->dropped,
                                direction->under_way.size(), mean / 1000, direction->late_max / 1000);
        }
        return text;
    }

private:
    static void set_port(Direction& direction, std::uint16_t port, bool drop)
    {
        if (drop) {
            direction.dropped_ports.insert(port);
        } else {
            direction.dropped_ports.erase(port);
        }
    }

    bool lost(const Direction& direction, std::size_t size)
    {
        if (direction.drop || direction.under_way.size() >= queue_limit)
            return true;
        if (!direction.dropped_ports.empty()) {
            const auto ports = tcp_ports(buffer_.data(), size);
            if (ports && (direction.dropped_ports.contains(ports->source) ||
                          direction.dropped_ports.contains(ports->destination))) {
                return true;
            }
        }
        return loss_ > 0 && std::uniform_real_distribution<double>(0, 1)(random_) < loss_;
    }

    void take(Direction& direction)
    {
        for (int count = 0; count < batch_size; ++count) {
            const ssize_t got = read(direction.from, buffer_.data(), buffer_.size());
            if (got < 0) {
                if (errno == EINTR)
                    continue;
                if (errno == EAGAIN)
                    return;
                fail_errno(fmt::format("read from the {} device", direction.name));
            }
            const auto size = static_cast<std::size_t>(got);
            if (lost(direction, size)) {
                ++direction.dropped;
                continue;
            }
            std::int64_t due = now() + delay_;
            // A delay that was just made shorter must not let a packet overtake another.
            if (!direction.under_way.empty())
                due = std::max(due, direction.under_way.back().due);
            direction.under_way.push_back(
                {.due = due, .bytes = {buffer_.begin(), buffer_.begin() + static_cast<std::ptrdiff_t>(size)}});
        }
    }

    static void deliver_due(Direction& direction)
    {
        while (!direction.under_way.empty()) {
            const Packet& packet = direction.under_way.front();
            const std::int64_t late = now() - packet.due;
            if (late < 0)
                return;
            if (write(direction.to, packet.bytes.data(), packet.bytes.size()) ==
                static_cast<ssize_t>(packet.bytes.size())) {
                ++direction.forwarded;
                direction.late_total += late;
                direction.late_max = std::max(direction.late_max, late);
            } else {
                ++direction
                      .dropped; // the far device is down, or the kernel has no memory: a wire loses the packet then
            }
            direction.under_way.pop_front();
        }
    }

    std::int64_t delay_;
    double loss_;
    std::mt19937_64 random_;
    Direction right_bound_;
    Direction left_bound_;
    std::array<std::uint8_t, max_packet> buffer_{};
};

// ---- control socket
// -----------------------------------------------------------------------------------------------------

struct Controller {
    Fd fd;
    std::string pending{};
};

Fd listen_for_control(const Guardian& guardian, const std::string& path)
{
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    if (path.size() >= sizeof address.sun_path) {
        throw Failure(
            fmt::format("--control {}: longer than {} bytes: use a shorter path", path, sizeof address.sun_path - 1));
    }
    std::memcpy(address.sun_path, path.c_str(), path.size() + 1);
    Fd listener(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
    if (listener.get() < 0)
        fail_errno("control socket");
    if (bind(listener.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0) {
        fail_errno(fmt::format("--control {}", path), "choose another path, or remove it if it is left over");
    }
    guardian.watch("socket " + path);
    if (listen(listener.get(), static_cast<int>(max_controllers)) != 0)
        fail_errno("control socket");
    return listener;
}

// False when the controller is to be dropped: it left, sent a line that is too long or does not read its answers.
bool serve(Controller& controller, Wire& wire)
{
    std::array<char, 512> part{};
    const ssize_t got = read(controller.fd.get(), part.data(), part.size());
    if (got < 0)
        return errno == EAGAIN || errno == EINTR;
    if (got == 0)
        return false;
    controller.pending.append(part.data(), static_cast<std::size_t>(got));
    for (std::size_t end = 0; (end = controller.pending.find('\n')) != std::string::npos;) {
        const std::string answer = wire.obey(std::string_view(controller.pending).substr(0, end)) + "\n";
        controller.pending.erase(0, end + 1);
        if (send(controller.fd.get(), answer.data(), answer.size(), MSG_NOSIGNAL) !=
            static_cast<ssize_t>(answer.size())) {
            return false;
        }
    }
    return controller.pending.size() <= max_control_line;
}

// ---- the program
// ----------------------------------------------------------------------------------------------------------

pid_t start_command(const Options& options, const sigset_t& signals)
{
    const pid_t pid = fork();
    if (pid < 0)
        fail_errno("fork");
    if (pid > 0)
        return pid;
    sigprocmask(SIG_UNBLOCK, &signals, nullptr);
    setpriority(PRIO_PROCESS, 0, 0);
    prctl(PR_SET_PDEATHSIG, SIGTERM);
    setenv("FINRACE_LEFT", options.left.c_str(), 1);
    setenv("FINRACE_RIGHT", options.right.c_str(), 1);
    setenv("FINRACE_LEFT_ADDRESS", options.left_address.c_str(), 1);
    setenv("FINRACE_RIGHT_ADDRESS", options.right_address.c_str(), 1);
    setenv("FINRACE_LEFT_ADDRESS6", options.left_address6.c_str(), 1);
    setenv("FINRACE_RIGHT_ADDRESS6", options.right_address6.c_str(), 1);
    if (!options.control.empty())
        setenv("FINRACE_CONTROL", options.control.c_str(), 1);
    execvp(options.command[0], options.command.data());
    fmt::print(stderr, "delay-line: {}: {}\n", options.command[0], std::strerror(errno));
    _exit(errno == ENOENT ? 127 : 126);
}

int exit_status(int status)
{
    return WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
}

void arm(int timer, std::optional<std::int64_t> due)
{
    itimerspec when{};
    if (due) {
        // A time of zero would disarm it; anything in the past fires at once.
        const std::int64_t at = std::max<std::int64_t>(*due, 1);
        when.it_value = {.tv_sec = at / nanos_per_second, .tv_nsec = at % nanos_per_second};
    }
    if (timerfd_settime(timer, TFD_TIMER_ABSTIME, &when, nullptr) != 0)
        fail_errno("timer");
}

class Program {
public:
    explicit Program(const Options& options) : options_(options) {}

    int run()
    {
        block_signals();
        share_namespace_folder();
        Fd left = make_end(guardian_, options_.left, options_.left_address, options_.left_address6);
        Fd right = make_end(guardian_, options_.right, options_.right_address, options_.right_address6);
        Fd listener;
        if (!options_.control.empty())
            listener = listen_for_control(guardian_, options_.control);
        Wire wire(options_, left.get(), right.get());
        Fd timer(timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK));
        if (timer.get() < 0)
            fail_errno("timer");
        // The wire must not wait behind the programs that use it. Refused (no CAP_SYS_NICE), it is only less exact.
        setpriority(PRIO_PROCESS, 0, -10);

        fmt::print("ready left={} right={}\n", options_.left, options_.right);
        std::fflush(stdout);
        if (!options_.command.empty())
            child_ = start_command(options_, signals_);

        std::vector<Controller> controllers;
        std::vector<pollfd> waits;
        while (!status_) {
            wire.deliver_due();
            std::optional<std::int64_t> wake = wire.next_due();
            if (child_deadline_)
                wake = wake ? std::min(*wake, *child_deadline_) : *child_deadline_;
            arm(timer.get(), wake);
            waits.clear();
            for (const int fd : {timer.get(), signal_fd_.get(), left.get(), right.get(), listener.get()}) {
                waits.push_back({.fd = fd, .events = POLLIN, .revents = 0});
            }
            for (const Controller& controller : controllers) {
                waits.push_back({.fd = controller.fd.get(), .events = POLLIN, .revents = 0});
            }
            if (poll(waits.data(), waits.size(), -1) < 0 && errno != EINTR)
                fail_errno("poll");
            if (child_deadline_ && now() >= *child_deadline_) {
                kill(child_, SIGKILL);
                child_deadline_.reset();
            }
            // Orders first: a black hole is open from the moment its `ok` is read.
            constexpr std::size_t fixed_part = 5;
            for (std::size_t index = controllers.size(); index-- > 0;) {
                if (waits[fixed_part + index].revents != 0 && !serve(controllers[index], wire)) {
                    controllers.erase(controllers.begin() + static_cast<std::ptrdiff_t>(index));
                }
            }
            if (waits[4].revents != 0)
                accept_controller(listener.get(), controllers);
            if (waits[2].revents != 0)
                wire.take_from_left();
            if (waits[3].revents != 0)
                wire.take_from_right();
            if (waits[1].revents != 0)
                handle_signals();
        }
        if (options_.verbose)
            fmt::print(stderr, "delay-line: {}\n", wire.stats());
        return *status_;
    }

private:
    void block_signals()
    {
        sigemptyset(&signals_);
        for (const int signal : {SIGINT, SIGTERM, SIGHUP, SIGCHLD})
            sigaddset(&signals_, signal);
        if (sigprocmask(SIG_BLOCK, &signals_, nullptr) != 0)
            fail_errno("sigprocmask");
        signal_fd_ = Fd(signalfd(-1, &signals_, SFD_CLOEXEC | SFD_NONBLOCK));
        if (signal_fd_.get() < 0)
            fail_errno("signalfd");
    }

    static void accept_controller(int listener, std::vector<Controller>& controllers)
    {
        Fd fd(accept4(listener, nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
        if (fd.get() < 0)
            return;
        if (controllers.size() >= max_controllers) {
            constexpr std::string_view answer = "error too many controllers\n";
            send(fd.get(), answer.data(), answer.size(), MSG_NOSIGNAL);
            return;
        }
        controllers.push_back({.fd = std::move(fd)});
    }

    void handle_signals()
    {
        signalfd_siginfo info{};
        while (read(signal_fd_.get(), &info, sizeof info) == static_cast<ssize_t>(sizeof info)) {
            const int signal = static_cast<int>(info.ssi_signo);
            if (signal == SIGCHLD) {
                int status = 0;
                if (child_ > 0 && waitpid(child_, &status, WNOHANG) == child_)
                    status_ = interrupted_.value_or(exit_status(status));
                continue;
            }
            interrupted_ = 128 + signal;
            if (child_ <= 0) {
                status_ = 0; // without a command, a signal is how the line is meant to end
            } else {
                kill(child_, signal);
                if (!child_deadline_)
                    child_deadline_ = now() + child_patience;
            }
        }
    }

    const Options& options_;
    Guardian guardian_;
    sigset_t signals_{};
    Fd signal_fd_;
    pid_t child_ = -1;
    std::optional<std::int64_t> child_deadline_;
    std::optional<int> interrupted_;
    std::optional<int> status_;
};

// CLI11 validators return an empty string for a good value, else what is wrong.
template <typename Parser>
CLI::Validator form(Parser parse, const char* forms)
{
    return CLI::Validator(
        [parse, forms](std::string& text) {
            return parse(text) ? std::string() : fmt::format("'{}' is not accepted: use {}", text, forms);
        },
        "");
}

std::optional<int> parse_address(const std::string& text, int family)
{
    std::array<std::uint8_t, sizeof(in6_addr)> scratch{};
    if (inet_pton(family, text.c_str(), scratch.data()) != 1)
        return std::nullopt;
    return family;
}

std::optional<int> parse_name(const std::string& text)
{
    const bool good =
        !text.empty() && text.size() <= 64 && text[0] != '.' && text[0] != '-' &&
        text.find_first_not_of("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-") == text.npos;
    return good ? std::optional<int>(1) : std::nullopt;
}

constexpr const char* examples = R"(
Examples:
  delay-line --delay 20ms -- bash -c 'ip netns exec $FINRACE_LEFT ping -c3 $FINRACE_RIGHT_ADDRESS'
  delay-line --control /run/line.sock &   # then: echo 'drop right-to-left' | nc -U /run/line.sock

Control commands, a line each, answered by `ok ...` or `error ...`:
  drop left-to-right|right-to-left|both|none [port N]    black hole; with a port, for that TCP port alone
  delay 5ms      loss 0.5%      stats
)";

int main_checked(int argc, char** argv)
{
    Options options;
    std::string delay = "20ms";
    std::string loss = "0%";
    std::string drop = "none";

    // What follows `--` is the command's, whatever it looks like.
    int own = argc;
    for (int index = 1; index < argc; ++index) {
        if (std::string_view(argv[index]) != "--")
            continue;
        own = index;
        options.command.assign(argv + index + 1, argv + argc);
        if (options.command.empty()) {
            fmt::print(stderr, "delay-line: `--` must be followed by a command\n");
            return 2;
        }
        options.command.push_back(nullptr);
        break;
    }

    CLI::App app{"Two network namespaces joined by a wire with a chosen delay, loss and black holes"};
    app.footer(examples);
    const CLI::Validator name = form(parse_name, "up to 64 letters, digits, '.', '_' or '-'");
    const CLI::Validator address4 =
        form([](const std::string& text) { return parse_address(text, AF_INET); }, "an IPv4 address: 10.77.0.1");
    const CLI::Validator address6 = form(
        [](const std::string& text) { return text == "none" ? std::optional<int>(0) : parse_address(text, AF_INET6); },
        "an IPv6 address or none: fd77::1");
    app.add_option("--left", options.left, "name of the left namespace")->check(name)->capture_default_str();
    app.add_option("--right", options.right, "name of the right namespace")->check(name)->capture_default_str();
    app.add_option("--left-address", options.left_address)->check(address4)->capture_default_str();
    app.add_option("--right-address", options.right_address)->check(address4)->capture_default_str();
    app.add_option("--left-address6", options.left_address6)->check(address6)->capture_default_str();
    app.add_option("--right-address6", options.right_address6)->check(address6)->capture_default_str();
    app.add_option("--delay", delay, "one-way delay")
        ->check(form(parse_duration, duration_forms))
        ->capture_default_str();
    app.add_option("--loss", loss, "share of packets lost, each way")
        ->check(form(parse_loss, loss_forms))
        ->capture_default_str();
    app.add_option("--drop", drop, fmt::format("black hole: {}", drop_forms))
        ->check(form(parse_drop, drop_forms))
        ->capture_default_str();
    app.add_option("--seed", options.seed, "seed of the loss")->capture_default_str();
    app.add_option("--control", options.control, "unix stream socket that takes commands while the line runs");
    app.add_flag("--verbose", options.verbose, "counts on standard error at the end");
    try {
        app.parse(own, argv);
    } catch (const CLI::ParseError& error) {
        if (error.get_exit_code() == 0)
            return app.exit(error);
        fmt::print(stderr, "delay-line: {}\nSee delay-line --help\n", error.what());
        return 2;
    }
    options.delay = *parse_duration(delay);
    options.loss = *parse_loss(loss);
    options.drop = *parse_drop(drop);
    if (options.left == options.right) {
        fmt::print(stderr, "delay-line: --left and --right are both '{}': use two names\n", options.left);
        return 2;
    }
    return Program(options).run();
}

} // namespace

int main(int argc, char** argv)
{
    try {
        return main_checked(argc, argv);
    } catch (const Failure& error) {
        fmt::print(stderr, "delay-line: {}\n", error.what());
        return 2;
    }
}
