// SPDX-License-Identifier: GPL-2.0-only OR MIT
#include "cli/options.h"

#include <algorithm>
#include <cerrno>
#include <climits>
#include <cstdio>
#include <cstring>
#include <map>
#include <string_view>
#include <utility>

#include <CLI/CLI.hpp>
#include <fcntl.h>
#include <fmt/format.h>
#include <poll.h>
#include <unistd.h>

#include "source/descriptor.h"

namespace finrace {

namespace {

constexpr std::uint64_t smallest_ring = 4096;
constexpr std::uint64_t largest_ring = 1U << 30U;
constexpr std::chrono::nanoseconds shortest_duration = std::chrono::seconds(1);

} // namespace

std::vector<const CLI::App*> commands_of(const CLI::App& program)
{
    return program.get_subcommands([](const CLI::App*) { return true; });
}

std::vector<std::string> command_names(const CLI::App& program)
{
    std::vector<std::string> names;
    for (const CLI::App* command : commands_of(program))
        names.push_back(command->get_name());
    return names;
}

const CLI::App* command_named(const CLI::App& program, std::string_view name)
{
    const std::vector<const CLI::App*> commands = commands_of(program);
    const auto found = std::find_if(commands.begin(), commands.end(),
                                    [name](const CLI::App* command) { return command->get_name() == name; });
    return found != commands.end() ? *found : nullptr;
}

CLI::Option* add_parsed(CLI::App& command, const std::string& name, const std::string& type,
                        const std::string& description, std::function<void(const std::string&)> parse)
{
    const auto read = [name, parse = std::move(parse)](const std::vector<std::string>& texts) {
        for (const std::string& text : texts) {
            try {
                parse(text);
            } catch (const UsageError& error) {
                throw CLI::ValidationError(name, error.what());
            }
        }
    };
    CLI::Option* option = command.add_option_function<std::vector<std::string>>(name, read, description);
    return option->type_name(type)->expected(1)->allow_extra_args(false); // what follows it may be a file
}

void add_watch_options(CLI::App& command, WatchOptions& options)
{
    add_parsed(command, "--upstream", "ADDR[/LEN][:PORT]|:PORT",
               "only connections to this upstream, no host name; may be repeated. IPv6 with a port in brackets: "
               "[2001:db8::5]:8080",
               [&](const std::string& text) {
                   options.filter.upstreams.push_back(parse_address_pattern(text));
                   options.filter.flags.push_back("--upstream " + text);
               })
        ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll);
    add_parsed(command, "--process", "NAME|PID", "only connections of this process; may be repeated",
               [&](const std::string& text) {
                   options.filter.processes.push_back(parse_process_pattern(text));
                   options.filter.flags.push_back("--process " + text);
               })
        ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll);
    add_parsed(command, "--side", "client|server",
               "only what this host opened (client), or accepted (server, by trace)", [&](const std::string& text) {
                   options.filter.side = choose<Side>({{"client", Side::client}, {"server", Side::server}}, text);
                   options.filter.flags.push_back("--side " + text);
               });
    add_parsed(
        command, "--idle-timeout", "ADDR[/LEN][:PORT]=DURATION",
        "an upstream's idle timer, where you know it: until it is learned; may be repeated, the first that matches "
        "counts",
        [&](const std::string& text) { options.idle_timers.add(text); })
        ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll);
    add_parsed(command, "--backend", "auto|trace|cgroup", "how to watch the kernel; auto takes the first that works",
               [&](const std::string& text) {
                   options.live.backend = choose<Backend>(
                       {{"auto", Backend::automatic}, {"trace", Backend::trace}, {"cgroup", Backend::cgroup}}, text);
               });
    add_parsed(command, "--attach", "auto|fentry|kprobe", "how backend trace attaches", [&](const std::string& text) {
        options.live.attach =
            choose<Attach>({{"auto", Attach::automatic}, {"fentry", Attach::fentry}, {"kprobe", Attach::kprobe}}, text);
    });
    add_parsed(command, "--ring-bytes", "SIZE", "room for events on their way from the kernel (64k, 4M); default 4M",
               [&](const std::string& text) {
                   const std::uint64_t bytes = parse_size(text);
                   if (bytes < smallest_ring || bytes > largest_ring)
                       throw UsageError(fmt::format("'{}' is out of range; accepted: 4k to 1G", text));
                   options.live.ring_bytes = static_cast<std::uint32_t>(bytes);
               });
    command
        .add_option(
            "--max-connections", options.live.max_connections,
            "so many are followed at once where their accounting lies in tables: by kprobe, and by trace on Linux "
            "5.10; default 262144")
        ->type_name("COUNT")
        ->check(CLI::Range(64, 1 << 24).description(""));
}

CLI::Option* add_duration(CLI::App& command, std::optional<std::chrono::nanoseconds>& duration,
                          const std::string& otherwise)
{
    return add_parsed(command, "--for", "DURATION", "watch for this long (60s, 10m); " + otherwise,
                      [&duration](const std::string& text) {
                          duration = parse_duration(text);
                          if (*duration < shortest_duration)
                              throw UsageError(fmt::format("'{}' is too short; accepted: 1s and more", text));
                      });
}

void check_combination(const WatchOptions& options)
{
    if (options.live.backend == Backend::cgroup && options.live.attach != Attach::automatic)
        throw UsageError("--attach: backend cgroup has one way to attach only; leave it out, or take --backend trace");
    if (options.live.backend == Backend::cgroup && options.filter.side == Side::server)
        throw UsageError("--side server: backend cgroup doesn't tell what servers do; take --backend trace");
}

void check_told(const Filter& filter, const SourceFacts& facts)
{
    if (filter.side == Side::server && facts.backend == "cgroup")
        throw UsageError("--side server: backend cgroup, the one that works here, doesn't tell what servers do; "
                         "`finrace doctor` says what keeps backend trace from it");
}

std::string read_small_file(const std::string& path, std::size_t most_bytes, std::string_view flag)
{
    const auto refuse = [&](int error) {
        throw UsageError(fmt::format("{} {}: {}", flag, path, std::strerror(error)));
    };
    const Descriptor file(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NOCTTY));
    if (!file)
        refuse(errno);
    std::string text(most_bytes + 1, '\0');
    std::size_t size = 0;
    while (size < text.size()) {
        const ssize_t got = ::read(file.get(), text.data() + size, text.size() - size);
        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0)
            refuse(errno);
        if (got == 0)
            break;
        size += static_cast<std::size_t>(got);
    }
    if (size > most_bytes)
        refuse(EFBIG);
    text.resize(size);
    return text;
}

void say(const std::string& message)
{
    // Whoever reads this may be slow as well, and is not waited for by a daemon.
    constexpr int patience_ms = 100;
    const std::string whole = fmt::format("finrace: {}\n", message);
    for (std::string_view text = whole; !text.empty();) {
        pollfd ready{.fd = STDERR_FILENO, .events = POLLOUT, .revents = 0};
        if (::poll(&ready, 1, patience_ms) <= 0)
            return;
        // So much at least finds room in a pipe that poll() calls ready.
        const ssize_t count = ::write(STDERR_FILENO, text.data(), std::min<std::size_t>(text.size(), PIPE_BUF));
        if (count < 0 && errno != EINTR && errno != EAGAIN)
            return;
        text.remove_prefix(static_cast<std::size_t>(std::max<ssize_t>(count, 0)));
    }
}

} // namespace finrace
