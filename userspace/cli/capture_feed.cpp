// SPDX-License-Identifier: GPL-2.0-only OR MIT
#include "cli/capture_feed.h"

#include <algorithm>
#include <utility>

#include <fmt/format.h>

#include "cli/options.h"

namespace finrace {

namespace {

/// As often as the live sources are looked at.
constexpr std::uint64_t tick_ns = 200'000'000;

} // namespace

CaptureFeed::CaptureFeed(Filter filter, std::vector<Input> inputs)
{
    if (!filter.processes.empty())
        throw UsageError("--process: a capture does not show processes; leave it out, or choose by --upstream");
    if (filter.side == Side::server)
        throw UsageError("--side server: a capture is judged from the side that opened its connections; leave it out");
    for (Input& input : inputs)
        files_.push_back(std::make_unique<CaptureReader>(std::move(input), is_told_to_end));
    facts_.backend = "pcap";
    intake_.emplace(std::move(filter), names_, facts_.tells_outcomes);
}

SourceCounts CaptureFeed::counts() const
{
    SourceCounts counts = follower_ ? follower_->counts() : SourceCounts{};
    if (file_ != nullptr)
        counts.losses.by_place[LOSS_UNREADABLE] = file_->counts().unreadable;
    return counts;
}

bool CaptureFeed::reads(int descriptor) const
{
    return is_plain_file_among(descriptor, files_);
}

void CaptureFeed::run(Listener& listener)
{
    intake_->listen(listener);
    for (const auto& file : files_) {
        if (!listening_ || is_told_to_end())
            break;
        intake_->begin_anew(facts_.tells_outcomes);
        now_ns_ = 0;
        read(*file, listener);
        note_end(*file);
        if (listening_)
            listener.on_end();
    }
}

void CaptureFeed::read(CaptureReader& file, Listener& listener)
{
    file_ = &file;
    follower_.emplace([this](const event& e) {
        if (intake_->admits(e))
            intake_->take(e);
    });
    const auto tick = [&] {
        now_ns_ = follower_->now_ns();
        intake_->advance(now_ns_);
        listening_ = listener.on_tick();
    };
    while (listening_ && !is_told_to_end()) {
        const std::optional<Segment> segment = file.next();
        if (!segment)
            break;
        follower_->take(*segment);
        if (follower_->now_ns() >= now_ns_ + tick_ns)
            tick();
    }
    follower_->finish();
    if (listening_ && follower_->now_ns() != 0)
        tick();
    intake_->finish();
}

void CaptureFeed::note_end(const CaptureReader& file)
{
    const CaptureGaps& gaps = follower_->gaps();
    const CaptureCounts& counts = file.counts();
    captures_.push_back({.name = file.name(),
                         .vantage = follower_->vantage(),
                         .gaps = gaps,
                         .segments = counts.segments,
                         .unreadable = counts.unreadable});
    const bool cut_short = !file.problem().empty() && !is_told_to_end();
    missing_ += gaps.missing + gaps.one_direction + (cut_short ? 1 : 0);
    if (cut_short)
        say(fmt::format("warning: {} could not be read to its end: {}; what followed is missing", file.name(),
                        file.problem()));
    if (counts.segments == 0)
        say(fmt::format("warning: {} has no TCP segment in {} packets", file.name(), counts.packets));
    if (counts.unreadable > 0)
        say(fmt::format(
            "warning: {}: TCP segments without a header that could be read (a snapshot length below 96 bytes, "
            "or fragments): {}",
            file.name(), counts.unreadable));
    if (gaps.missing > 0)
        say(fmt::format("warning: {}: acknowledgements of what was not captured: {}; a verdict on their connections is "
                        "marked incomplete",
                        file.name(), gaps.missing));
    if (gaps.one_direction > 0)
        say(fmt::format(
            "warning: {}: connections that were captured in one direction alone, of which nothing is said: {}",
            file.name(), gaps.one_direction));
}

} // namespace finrace
