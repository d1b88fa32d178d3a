// SPDX-License-Identifier: GPL-2.0-only OR MIT
#include "cli/recorder.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <utility>

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <fmt/format.h>

#include "cli/confinement.h"
#include "cli/options.h"
#include "sink/untampered.h"
#include "source/descriptor.h"

namespace finrace {

namespace {

/// Longer than anything waits to be judged after the last event: from then on a tick changes nothing that the next
/// one would not.
constexpr std::uint64_t ticks_matter_ns = 2'000'000'000;
constexpr std::uint64_t smallest_part = 64U << 10U;
constexpr std::uint64_t rotation_retried_ns = 10'000'000'000;
constexpr std::chrono::milliseconds longest_wait_to_rotate(100);

std::string new_run()
{
    std::random_device random;
    return fmt::format("{:08x}{:08x}", random(), random());
}

/// Whether a file, to which a recording is to be added, holds one that is damaged or of another version. Throws
/// OutputError if it holds something else.
bool holds_what_is_not_read(const std::string& path)
{
    struct stat status {};
    if (::stat(path.c_str(), &status) != 0 || !S_ISREG(status.st_mode) || status.st_size == 0)
        return false;
    try {
        const RecordingReader reader(path);
        return false;
    } catch (const NoRecording& error) {
        throw OutputError(fmt::format("{}; nothing is added to it: name another file", error.what()));
    } catch (const RecordingError&) {
        return true;
    }
}

bool differ(const SourceCounts& one, const SourceCounts& other)
{
    return one.connections_begun != other.connections_begun || one.connections_adopted != other.connections_adopted ||
           std::memcmp(&one.losses, &other.losses, sizeof(one.losses)) != 0;
}

} // namespace

void add_record_options(CLI::App& command, const std::string& flag, RecordOptions& options)
{
    command
        .add_option(flag, options.path, "append all events to this file (created with mode 0600); - is standard output")
        ->type_name("FILE");
    add_parsed(command, "--rotate", "SIZE", "go on in a new file at this size, FILE becoming FILE.1; default 64M",
               [&](const std::string& text) {
                   options.rotate_bytes = parse_size(text);
                   if (options.rotate_bytes < smallest_part)
                       throw UsageError(fmt::format("'{}' is too small; accepted: 64k and more", text));
               });
    command.add_option("--keep", options.keep, "so many older files: FILE.1, FILE.2, ...; default 4")
        ->type_name("COUNT")
        ->check(CLI::Range(0, 10'000).description("")); // else it becomes a part of the type's name
}

void check_record_options(const CLI::App& command, const std::string& flag)
{
    for (const char* other : {"--rotate", "--keep"})
        if (command.count(other) > 0 && command.count(flag) == 0)
            throw UsageError(fmt::format("{} says how to keep what {} records: give both, or none", other, flag));
}

std::vector<std::string> Recorder::files() const
{
    return writes_to_file() ? std::vector<std::string>{options_.path} : std::vector<std::string>();
}

void say_missing(const Recorder& recorder)
{
    if (recorder.closed_by_reader())
        say(fmt::format("nobody read the recording any more; {} lines of it are missing", recorder.dropped()));
    else if (recorder.dropped() > 0)
        say(fmt::format("{} lines of the recording are missing: {} did not take them", recorder.dropped(),
                        recorder.path()));
}

Recorder::Recorder(RecordOptions options)
    : options_(std::move(options)), stream_([&] {
          if (options_.path == "-")
              return Stream::to_descriptor(STDOUT_FILENO);
          // The file that was looked at, whatever has its name by then.
          const Descriptor trusted(open_untampered(options_.path, O_PATH));
          unreadable_before_ =
              holds_what_is_not_read(trusted ? fmt::format("/proc/self/fd/{}", trusted.get()) : options_.path);
          return Stream::to_file(options_.path);
      }())
{
    if (options_.path != "-")
        options_.path = absolute_path(options_.path);
    if (!writes_to_file())
        return;
    if (unreadable_before_ && options_.keep == 0)
        throw OutputError(fmt::format("{} holds a recording that is damaged or of another version, and --keep 0 would "
                                      "remove it: name another file",
                                      options_.path));
    if (::flock(stream_.descriptor(), LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK)
        throw OutputError(fmt::format("another recorder writes to {}: name another file", options_.path));
    // A link is not what is rotated, but the file.
    const std::unique_ptr<char, decltype(&::free)> real(::realpath(options_.path.c_str(), nullptr), &::free);
    if (real)
        options_.path = real.get();
    if (!leads_to(options_.path, stream_.descriptor()))
        throw OutputError(fmt::format("{} was replaced as it was opened: start again", options_.path), EAGAIN);
}

bool Recorder::writes_to_file() const
{
    struct stat status {};
    return options_.path != "-" && ::fstat(stream_.descriptor(), &status) == 0 && S_ISREG(status.st_mode);
}

void Recorder::begin(SourceFacts facts, std::vector<std::string> filter, bool connections, const WallClock& clock)
{
    header_ = {.version = FINRACE_VERSION,
               .run = new_run(),
               .part = 1,
               .written_ns = 0,
               .facts = std::move(facts),
               .filter = std::move(filter),
               .connections = connections};
    clock_ = {clock.offset_ns()};
    if (unreadable_before_) {
        shift_files();
        open_anew();
    }
    begin_part();
}

void Recorder::begin_part()
{
    header_.written_ns = static_cast<std::int64_t>(WallClock::monotonic_now_ns()) + clock_.offset_ns;
    named_in_part_.clear();
    placed_in_part_.clear();
    part_ended_ = false;
    write(header_);
    write(header_);
    write(clock_);
    if (counts_)
        write(*counts_);
}

void Recorder::write(const RecordingEntry& entry)
{
    const std::string line = encode(entry);
    // A file begins with its header; what was dropped before is told behind it.
    const std::uint64_t missing = std::holds_alternative<RecordingHeader>(entry) ? 0 : dropped() - dropped_noted_;
    const std::string gap = missing > 0 ? encode(RecordedGap{missing}) : "";
    // Once it is full it is to be half empty again: few gaps, and what is between them is of use.
    overflows_ =
        !stream_.takes(line.size() + gap.size() + 1) || (overflows_ && !stream_.takes(Stream::default_backlog / 2));
    if (overflows_) {
        ++refused_;
        return;
    }
    if (missing > 0) {
        dropped_noted_ += missing;
        stream_.write(gap);
        // What was said once for all may have been in it.
        named_in_part_.clear();
        placed_in_part_.clear();
        stream_.write(encode(clock_));
        if (counts_)
            stream_.write(encode(*counts_));
    }
    stream_.write(line);
}

void Recorder::put(const RecordingEntry& entry)
{
    if (const auto tick = std::exchange(tick_left_out_, std::nullopt))
        write(*tick);
    write(entry);
}

void Recorder::note_process(std::uint32_t pid, const ProcessNames& live)
{
    if (pid == 0)
        return;
    RecordedProcess process{.pid = pid, .name = {}};
    const std::string_view name = std::string_view(live.of(pid)).substr(0, process.name.size());
    if (name.empty())
        return;
    const bool fresh = names_.note(pid, name);
    if (!named_in_part_.insert(pid).second && !fresh)
        return;
    std::copy(name.begin(), name.end(), process.name.begin());
    put(process);
}

void Recorder::note_placement(std::uint32_t pid, const ProcessNames& live)
{
    if (pid == 0)
        return;
    const Placement& there = live.placement(pid);
    const bool fresh = names_.note(pid, there);
    if ((!placed_in_part_.insert(pid).second || there == Placement{}) && !fresh)
        return;
    put(RecordedPlacement{
        .pid = pid, .cgroup = there.cgroup, .pod_namespace = there.pod_namespace, .pod_name = there.pod_name});
}

void Recorder::add(const event& e)
{
    ++events_;
    newest_event_ns_ = std::max<std::uint64_t>(newest_event_ns_, e.timestamp_ns);
    put(e);
}

void Recorder::add(const RecordedTick& tick)
{
    if (tick.now_ns > newest_event_ns_ + ticks_matter_ns)
        tick_left_out_ = tick;
    else
        put(tick);
    flush();
    rotate_if_due();
}

void Recorder::flush()
{
    stream_.flush();
    say_problem();
}

void Recorder::add(const WallClock& clock, const SourceCounts& counts)
{
    reopen_if_moved();
    if (clock.offset_ns() != clock_.offset_ns) {
        clock_ = {clock.offset_ns()};
        put(clock_);
    }
    if (!counts_ || differ(*counts_, counts)) {
        counts_ = counts;
        put(counts);
    }
}

void Recorder::end(const SourceCounts& counts)
{
    put(counts);
    put(RecordedEnd{true});
    stream_.drain(Stream::last_words);
}

/// What waits is dropped, and counted: the new file begins with its header.
void Recorder::open_anew()
{
    stream_.reopen(options_.path, true);
    ::flock(stream_.descriptor(), LOCK_EX | LOCK_NB); // against a recorder that begins later
}

void Recorder::go_on_in_new_file()
{
    try {
        open_anew();
        ++header_.part;
        begin_part();
        rotation_refused_ = false;
        rotate_after_ns_ = 0;
    } catch (const OutputError& error) {
        if (!std::exchange(rotation_refused_, true))
            say(fmt::format("{}; the recording goes on in the file that was open before", error.what()));
    }
}

void Recorder::rotate_if_due()
{
    struct stat status {};
    const std::uint64_t now_ns = WallClock::monotonic_now_ns();
    if (now_ns < rotate_after_ns_ || !writes_to_file() || ::fstat(stream_.descriptor(), &status) != 0 ||
        static_cast<std::uint64_t>(status.st_size) < options_.rotate_bytes)
        return;
    rotate_after_ns_ = now_ns + rotation_retried_ns; // unless it works
    const auto grows_on = [&](const char* why) {
        if (!std::exchange(rotation_refused_, true))
            say(fmt::format("cannot rotate the recording: {}; it grows on, and that is tried again", why));
    };
    const auto is_all_out = [&] {
        stream_.flush_for(longest_wait_to_rotate);
        if (stream_.waiting() > 0 && stream_.problem() == 0) // else that problem is told
            grows_on("its disk takes less than there is to write");
        return stream_.waiting() == 0;
    };
    if (!is_all_out())
        return;
    if (!std::exchange(part_ended_, true))
        put(RecordedEnd{false});
    if (!is_all_out())
        return;
    try {
        shift_files();
    } catch (const OutputError& error) {
        grows_on(error.what());
        return;
    }
    go_on_in_new_file();
}

void Recorder::shift_files() const
{
    const std::size_t slash = options_.path.rfind('/') + 1; // it is from the root on
    const std::string folder = options_.path.substr(0, slash);
    const std::string file = options_.path.substr(slash);
    const auto name = [&](unsigned number) { return number == 0 ? file : fmt::format("{}.{}", file, number); };
    const auto refused = [](const std::string& what, const std::string& path) {
        const int error = errno;
        return OutputError(fmt::format("cannot {} {}: {}", what, path, std::strerror(error)), error);
    };
    // That folder, wherever its name leads in a moment.
    const Descriptor there(open_untampered(folder, O_PATH | O_DIRECTORY));
    if (!there)
        throw refused("open", folder);
    // The new file first: where none can be made, nothing is moved.
    const std::string fresh = fmt::format("{}.{}.new", file, header_.run);
    const Descriptor made(::openat(there.get(), fresh.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600));
    if (!made)
        throw refused("create", folder + fresh);
    const auto move = [&](const std::string& from, const std::string& to) {
        if (::renameat(there.get(), from.c_str(), there.get(), to.c_str()) == 0)
            return;
        const OutputError error = refused(fmt::format("rename {}{} to", folder, from), folder + to);
        ::unlinkat(there.get(), fresh.c_str(), 0);
        throw error;
    };
    // Up to the first number that is free, so that what was broken off once pushes no file out.
    unsigned last = 1;
    while (last < options_.keep && ::faccessat(there.get(), name(last).c_str(), F_OK, 0) == 0)
        ++last;
    for (unsigned number = std::min(last, options_.keep); number > 0; --number)
        move(name(number - 1), name(number));
    move(fresh, file);
}

/// Somebody else has rotated the file, or removed it.
void Recorder::reopen_if_moved()
{
    struct stat ours {};
    struct stat there {};
    if (!writes_to_file() || ::fstat(stream_.descriptor(), &ours) != 0)
        return;
    if (::stat(options_.path.c_str(), &there) == 0 && there.st_ino == ours.st_ino && there.st_dev == ours.st_dev)
        return;
    if (!std::exchange(part_ended_, true))
        put(RecordedEnd{false});
    go_on_in_new_file();
}

OutputState Recorder::state() const
{
    return {.name = "record:" + options_.path,
            .written = stream_.written(),
            .dropped = dropped(),
            .bytes_waiting = stream_.waiting(),
            .problem = stream_.problem()};
}

void Recorder::say_problem()
{
    const int problem = stream_.problem();
    if (problem != 0 && problem != problem_said_)
        say(fmt::format("cannot write the recording to {}: {}; {} MiB wait at most, what is more is lost",
                        options_.path, std::strerror(problem), Stream::default_backlog >> 20U));
    else if (problem == 0 && problem_said_ != 0)
        say("the recording is written again");
    problem_said_ = problem;
}

} // namespace finrace
