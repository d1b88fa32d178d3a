// SPDX-License-Identifier: GPL-2.0-only OR MIT
#include "cli/replay.h"

#include <algorithm>
#include <iterator>
#include <map>
#include <tuple>
#include <utility>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "cli/options.h"
#include "sink/text.h"

namespace finrace {

namespace {

/// Calls the handler that fits the entry.
template <class... Handlers>
struct Handle : Handlers... {
    using Handlers::operator()...;
};
template <class... Handlers>
Handle(Handlers...) -> Handle<Handlers...>;

std::vector<std::unique_ptr<RecordingReader>> readers_of(const std::vector<std::string>& paths)
{
    std::vector<std::unique_ptr<RecordingReader>> readers;
    readers.reserve(paths.size());
    for (const std::string& path : paths)
        readers.push_back(std::make_unique<RecordingReader>(path, is_told_to_end));
    return readers;
}

} // namespace

Replay::Replay(Filter filter, bool connections, const std::vector<std::string>& paths)
    : Replay(std::move(filter), connections, readers_of(paths))
{
}

Replay::Replay(Filter filter, bool connections, std::vector<std::unique_ptr<RecordingReader>> files)
    : files_(std::move(files)), flags_(filter.flags), needs_connections_(connections)
{
    sort_files();
    header_ = files_.front()->first();
    if (filter.side == Side::server && header_.facts.backend == "cgroup")
        throw UsageError(
            fmt::format("--side server: {} was recorded by backend cgroup, which doesn't tell what servers do",
                        files_.front()->name()));
    intake_.emplace(std::move(filter), names_, header_.facts.tells_outcomes);
}

void Replay::sort_files()
{
    std::map<std::string, std::int64_t> begun; // by run
    for (const auto& file : files_) {
        const RecordingHeader& first = file->first();
        const auto [run, fresh] = begun.try_emplace(first.run, first.written_ns);
        run->second = std::min(run->second, first.written_ns);
    }
    const auto place = [&begun](const RecordingReader& file) {
        const RecordingHeader& first = file.first();
        return std::make_tuple(begun.at(first.run), first.run, first.part);
    };
    std::stable_sort(files_.begin(), files_.end(),
                     [&](const auto& one, const auto& other) { return place(*one) < place(*other); });
    const auto same = std::adjacent_find(
        files_.begin(), files_.end(), [&](const auto& one, const auto& other) { return place(*one) == place(*other); });
    if (same != files_.end())
        throw UsageError(fmt::format("{} and {} are the same part of one recording; name it once", (*same)->name(),
                                     (*std::next(same))->name()));
}

bool Replay::reads(int descriptor) const
{
    return is_plain_file_among(descriptor, files_);
}

void Replay::run(Listener& listener)
{
    intake_->listen(listener);
    for (const auto& file : files_) {
        if (!listening_ || is_told_to_end())
            break;
        try {
            read(*file, listener);
        } catch (const RecordingError& error) {
            say(error.what());
            failed_ = true;
        }
        missing_ += file->damaged_lines() + lines_in_gaps_ + (file->cut_short() ? 1 : 0);
        if (file->damaged_lines() > 0)
            say(fmt::format("warning: {}: {} damaged lines; what they told is missing", file->name(),
                            file->damaged_lines()));
        if (gaps_ > 0)
            say(fmt::format("warning: {}: {} lines are missing in {} places, which the recorder could not write",
                            file->name(), std::exchange(lines_in_gaps_, 0), std::exchange(gaps_, 0)));
        if (file->cut_short() && !is_told_to_end())
            say(fmt::format("warning: {} is cut short within a line; what followed is missing", file->name()));
    }
    missing_ += in_run_ || failed_ ? 1 : 0;
    if (in_run_ && listening_ && !is_told_to_end())
        say(fmt::format("warning: {} does not end as a recording does: it is still being written, or the recorder was "
                        "killed, or more files follow",
                        files_.back()->name()));
    end_run(listener);
}

void Replay::begin(const RecordingHeader& header, const RecordingReader& file, Listener& listener)
{
    const bool again = in_run_ && header.run == header_.run && header.part == header_.part; // each is written twice
    const bool goes_on = again || (in_run_ && header.run == header_.run && header.part > header_.part);
    if (const std::uint32_t next = header_.part + 1; goes_on && !again && header.part > next) {
        missing_ += header.part - next;
        say(fmt::format("warning: {} of the recording, before {}, {} not here; what was told there is missing",
                        header.part == next + 1 ? fmt::format("part {}", next)
                                                : fmt::format("parts {} to {}", next, header.part - 1),
                        file.name(), header.part == next + 1 ? "is" : "are"));
    }
    if (!goes_on) {
        missing_ += (in_run_ ? 1 : 0) + header.part - 1;
        if (in_run_)
            say(fmt::format("warning: the run before {} was not ended as it should; its last events may be missing",
                            file.name()));
        end_run(listener);
        if (header.part > 1)
            say(fmt::format("warning: {} begins with part {} of its recording; what came before is missing",
                            file.name(), header.part));
        if (!header.filter.empty() && header.filter != flags_)
            say(fmt::format("{} was recorded with {}: give the same flags for the same verdicts", file.name(),
                            printable(fmt::format("{}", fmt::join(header.filter, " ")))));
        if (needs_connections_ && !header.connections)
            say(fmt::format(
                "warning: {} was recorded without --connections: states, and what was accepted, are missing",
                file.name()));
        intake_->begin_anew(header.facts.tells_outcomes);
        names_.clear();
        counts_ = {};
    }
    header_ = header;
    in_run_ = true;
}

void Replay::end_run(Listener& listener)
{
    if (!std::exchange(told_, false))
        return;
    intake_->finish();
    if (listening_)
        listener.on_end();
    now_ns_ = 0;
}

void Replay::read(RecordingReader& file, Listener& listener)
{
    while (listening_ && !is_told_to_end()) {
        const std::optional<RecordingEntry> entry = file.next();
        if (!entry)
            return;
        std::visit(Handle{
                       [&](const RecordingHeader& header) { begin(header, file, listener); },
                       [&](const event& e) {
                           told_ = true;
                           now_ns_ = std::max<std::uint64_t>(now_ns_, e.timestamp_ns);
                           if (intake_->admits(e))
                               intake_->take(e);
                       },
                       [&](const RecordedTick& tick) {
                           told_ = true;
                           now_ns_ = tick.now_ns;
                           intake_->advance(tick.now_ns);
                           listening_ = listener.on_tick();
                       },
                       [&](const RecordedClock& clock) { clock_ = WallClock(clock.offset_ns); },
                       [&](const RecordedProcess& process) {
                           const auto* end = std::find(process.name.begin(), process.name.end(), '\0');
                           names_.note(process.pid,
                                       {process.name.data(), static_cast<std::size_t>(end - process.name.data())});
                       },
                       [&](const RecordedPlacement& there) { names_.note(there.pid, placement_of(there)); },
                       [&](const SourceCounts& counts) { counts_ = counts; },
                       [&](const RecordedGap& gap) {
                           ++gaps_;
                           lines_in_gaps_ += gap.lines;
                       },
                       [&](const RecordedEnd& end) { in_run_ = !end.run; },
                   },
                   *entry);
    }
}

} // namespace finrace
