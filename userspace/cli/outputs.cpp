// SPDX-License-Identifier: GPL-2.0-only OR MIT
#include "cli/outputs.h"

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <tuple>
#include <utility>

#include <fcntl.h>
#include <fmt/format.h>
#include <nlohmann/json.hpp>
#include <poll.h>
#include <sys/stat.h>
#include <unistd.h>

#include "cli/confinement.h"
#include "cli/options.h"
#include "sink/log_formats.h"
#include "sink/unix_socket.h"
#include "sink/untampered.h"
#include "source/descriptor.h"

namespace finrace {

namespace {

using Kind = OutputTarget::Kind;

constexpr int longest_poll_ms = 100;
constexpr std::chrono::seconds retried_every(5);
constexpr std::size_t flush_bytes = 64U << 10U;

struct Scheme {
    Kind kind;
    std::string_view name;
    std::string_view usual_path; ///< where there is one
};
constexpr std::array<Scheme, 4> schemes{{
    {Kind::stream_socket, "unix-stream", ""},
    {Kind::datagram_socket, "unix-dgram", ""},
    {Kind::syslog, "syslog", "/dev/log"},
    {Kind::journal, "journald", "/run/systemd/journal/socket"},
}};

/// A socket need not be there yet; the folder that it will be in is all that a confined finrace keeps of it.
void require_folder(const OutputTarget& target)
{
    if (target.path.front() == '@')
        return;
    std::error_code error;
    const std::filesystem::path folder = std::filesystem::path(target.path).parent_path();
    if (!std::filesystem::is_directory(folder, error))
        throw OutputError(fmt::format("--output {}: there is no folder {}; make it, or start what listens there first",
                                      target.text(), folder.string()));
    const Descriptor there(open_untampered(target.path, O_PATH));
    struct stat status {};
    if (there && ::fstat(there.get(), &status) == 0 && !S_ISSOCK(status.st_mode))
        throw OutputError(fmt::format("--output {}: that is no socket", target.text()));
}

} // namespace

std::string OutputTarget::text() const
{
    if (kind == Kind::standard_output)
        return "-";
    const auto* const scheme =
        std::find_if(schemes.begin(), schemes.end(), [&](const Scheme& one) { return one.kind == kind; });
    if (scheme == schemes.end())
        return path;
    return path == scheme->usual_path ? std::string(scheme->name) : fmt::format("{}:{}", scheme->name, path);
}

OutputTarget parse_output(const std::string& text)
{
    if (text == "-")
        return {};
    if (text.empty())
        throw UsageError(fmt::format("'' is no output; accepted: {}", output_forms));
    for (const Scheme& scheme : schemes) {
        if (!text.starts_with(scheme.name))
            continue;
        const std::string rest = text.substr(scheme.name.size());
        if (rest.empty() && !scheme.usual_path.empty())
            return {.kind = scheme.kind, .path = std::string(scheme.usual_path)};
        if (!rest.empty() && rest.front() != ':')
            continue; // a file whose name only begins so
        const std::string path = rest.empty() ? rest : rest.substr(1);
        if (!unix_address(path))
            throw UsageError(fmt::format("'{}' names no socket; accepted: {}:PATH, from the root on, or @NAME, of {} "
                                         "bytes at most",
                                         text, scheme.name, longest_unix_name));
        return {.kind = scheme.kind, .path = path};
    }
    return {.kind = Kind::file, .path = text};
}

Outputs::Outputs(std::vector<OutputTarget> targets, bool flat) : flat_(flat)
{
    for (OutputTarget& target : targets) {
        Output opened = open(std::move(target));
        std::optional<std::string> same;
        if (!opened.target.is_socket())
            same = same_file(std::get<Stream>(opened.to).descriptor());
        for (const Output& other : outputs_)
            if (opened.target.is_socket() && other.target.text() == opened.target.text())
                same = other.target.text();
        if (same)
            throw UsageError(
                fmt::format("--output {} and --output {} are the same; leave one out", *same, opened.target.text()));
        outputs_.push_back(std::move(opened));
    }
}

Outputs::Output Outputs::open(OutputTarget target)
{
    switch (target.kind) {
    case Kind::standard_output:
        return {std::move(target), Stream::to_descriptor(STDOUT_FILENO)};
    case Kind::file: {
        Stream file = Stream::to_file(target.path);
        return {std::move(target), std::move(file)};
    }
    default:
        break;
    }
    require_folder(target);
    if (target.kind == Kind::stream_socket) {
        Stream socket = Stream::to_socket(target.path);
        return {std::move(target), std::move(socket)};
    }
    Datagrams socket(target.path);
    return {std::move(target), std::move(socket)};
}

void Outputs::put(const Json& record)
{
    const Json flat = flat_ ? flattened(record) : Json();
    const Json& shown = flat_ ? flat : record;
    write_line(line_, shown);
    for (Output& output : outputs_) {
        if (auto* stream = std::get_if<Stream>(&output.to)) {
            stream->write(line_);
            continue;
        }
        auto& datagrams = std::get<Datagrams>(output.to);
        switch (output.target.kind) {
        case Kind::syslog:
            datagrams.write(syslog_message(record, shown, ::getpid()));
            break;
        case Kind::journal:
            datagrams.write(journal_entry(record));
            break;
        default:
            datagrams.write(line_);
            break;
        }
    }
    unflushed_bytes_ += line_.size();
}

void Outputs::flush()
{
    unflushed_bytes_ = 0;
    for (Output& output : outputs_)
        std::visit([](auto& to) { to.flush(); }, output.to);
}

bool Outputs::is_due() const
{
    return unflushed_bytes_ >= flush_bytes;
}

void Outputs::drain(std::chrono::milliseconds limit)
{
    // Together: none of them may take the others' time.
    for (const auto deadline = std::chrono::steady_clock::now() + limit;;) {
        flush();
        std::vector<pollfd> waiting;
        for (const Output& output : outputs_)
            std::visit(
                [&](const auto& to) {
                    if (to.awaits())
                        waiting.push_back(to.awaited());
                },
                output.to);
        if (waiting.empty() || std::chrono::steady_clock::now() >= deadline)
            break;
        ::poll(waiting.data(), waiting.size(), longest_poll_ms);
    }
    for (Output& output : outputs_)
        std::visit([](auto& to) { to.drop_waiting(); }, output.to);
}

bool Outputs::has_ended(const Output& output)
{
    const auto* stream = std::get_if<Stream>(&output.to);
    return stream != nullptr && stream->closed_by_reader();
}

void Outputs::say_news_of(Output& output)
{
    const std::string name = output.target.text();
    const auto [problem, waiting, dropped] =
        std::visit([](const auto& to) { return std::tuple(to.problem(), to.waiting(), to.dropped()); }, output.to);
    if (has_ended(output) && !output.ended_said)
        say(fmt::format("nobody reads {} any more; what goes there is dropped", name));
    output.ended_said = has_ended(output);
    if (problem != 0 && problem != output.problem_said)
        say(fmt::format("cannot write records to {}: {}; they wait ({} MiB at most) and are tried again", name,
                        std::strerror(problem), Stream::default_backlog >> 20U));
    else if (problem == 0 && output.problem_said != 0)
        say(fmt::format("records are written again to {}", name));
    output.problem_said = problem;

    if (dropped > output.dropped_before && !output.overflow_said && !has_ended(output)) {
        output.overflow_said = true;
        output.dropped_at_overflow = output.dropped_before;
        say(fmt::format("records for {} are dropped: it does not take them as they come", name));
    } else if (output.overflow_said && problem == 0 && waiting == 0) {
        output.overflow_said = false;
        say(fmt::format("{} takes records again: {} were dropped", name, dropped - output.dropped_at_overflow));
    }
    output.dropped_before = dropped;
}

void Outputs::say_news()
{
    for (Output& output : outputs_)
        say_news_of(output);
}

void Outputs::say_dropped() const
{
    for (const OutputState& state : states())
        if (state.dropped > 0)
            say(fmt::format("{} records were dropped: {} did not take them", state.dropped, state.name));
}

void Outputs::write_behind()
{
    for (Output& output : outputs_)
        if (auto* stream = std::get_if<Stream>(&output.to))
            stream->write_behind();
}

bool Outputs::beyond_standard_output() const
{
    return std::any_of(outputs_.begin(), outputs_.end(),
                       [](const Output& output) { return output.target.kind != Kind::standard_output; });
}

void Outputs::open_anew()
{
    for (Output& output : outputs_) {
        if (output.target.kind != Kind::file)
            continue;
        struct stat status {};
        if (::fstat(std::get<Stream>(output.to).descriptor(), &status) == 0 &&
            S_ISCHR(status.st_mode)) // nobody rotates a device
            continue;
        output.reopen_problem = 0; // whoever asks is answered
        open_anew(output);
    }
}

void Outputs::open_anew(Output& output)
{
    try {
        std::get<Stream>(output.to).reopen(output.target.path);
        output.reopen_problem = 0;
        say(fmt::format("{} is opened anew", output.target.path));
    } catch (const OutputError& error) {
        if (std::exchange(output.reopen_problem, error.error != 0 ? error.error : EIO) == 0)
            say(fmt::format("{}; records go on into the file that was open before, and that is tried again",
                            error.what()));
    }
}

void Outputs::retry(std::chrono::steady_clock::time_point now)
{
    if (now - retried_at_ < retried_every)
        return;
    retried_at_ = now;
    for (Output& output : outputs_)
        if (output.reopen_problem != 0)
            open_anew(output);
}

void Outputs::make_absolute()
{
    for (Output& output : outputs_)
        if (output.target.kind == Kind::file) {
            output.target.path = absolute_path(output.target.path);
            if (!leads_to(output.target.path, std::get<Stream>(output.to).descriptor()))
                throw OutputError(fmt::format("{} was replaced as it was opened: start again", output.target.path),
                                  EAGAIN);
        }
}

std::vector<pollfd> Outputs::awaited() const
{
    std::vector<pollfd> all;
    for (const Output& output : outputs_)
        all.push_back(std::visit([](const auto& to) { return to.awaited(); }, output.to));
    return all;
}

void Outputs::reader_left(int descriptor)
{
    for (Output& output : outputs_)
        if (auto* stream = std::get_if<Stream>(&output.to); stream != nullptr && stream->descriptor() == descriptor)
            stream->reader_left();
}

bool Outputs::ended() const
{
    return std::all_of(outputs_.begin(), outputs_.end(), &has_ended);
}

std::optional<std::string> Outputs::same_file(int descriptor) const
{
    for (const Output& output : outputs_)
        if (!output.target.is_socket() && is_same_file(std::get<Stream>(output.to).descriptor(), descriptor))
            return output.target.text();
    return std::nullopt;
}

std::vector<std::string> Outputs::files() const
{
    std::vector<std::string> names;
    for (const Output& output : outputs_)
        if (output.target.kind == Kind::file)
            names.push_back(output.target.path);
    return names;
}

std::vector<std::string> Outputs::sockets() const
{
    std::vector<std::string> names;
    for (const Output& output : outputs_)
        if (output.target.is_socket())
            names.push_back(output.target.path);
    return names;
}

std::vector<OutputState> Outputs::states() const
{
    std::vector<OutputState> all;
    for (const Output& output : outputs_)
        all.push_back(std::visit(
            [&](const auto& to) {
                return OutputState{.name = output.target.text(),
                                   .written = to.written(),
                                   .dropped = to.dropped(),
                                   .bytes_waiting = to.waiting(),
                                   .problem = has_ended(output)   ? EPIPE
                                              : to.problem() != 0 ? to.problem()
                                                                  : output.reopen_problem};
            },
            output.to));
    return all;
}

} // namespace finrace
