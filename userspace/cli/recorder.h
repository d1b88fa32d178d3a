// SPDX-License-Identifier: GPL-2.0-only OR MIT
// Writes a recording while events are taken in: to a file that is rotated by size, or to standard output. What the
// disk does not take is counted, and the recording says where it is missing.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <unordered_set>
#include <vector>

#include "cli/command_line.h"
#include "cli/process_names.h"
#include "sink/clock.h"
#include "sink/json.h"
#include "sink/stream.h"
#include "source/recording.h"

namespace finrace {

struct RecordOptions {
    std::string path; ///< "-": standard output
    std::uint64_t rotate_bytes = 64U << 20U;
    unsigned keep = 4; ///< files besides the one that is written
};

/// --rotate and --keep, and the flag that names the file.
void add_record_options(CLI::App& command, const std::string& flag, RecordOptions& options);
/// What no single one of them can tell. Throws UsageError.
void check_record_options(const CLI::App& command, const std::string& flag);

/// At the end: what the recording lacks, if anything.
class Recorder;
void say_missing(const Recorder& recorder);

class Recorder {
public:
    /// What the file holds already stays in it. Throws OutputError, also if that is no recording.
    explicit Recorder(RecordOptions options);

    /// `connections`: the source tells all that `run --connections` needs. Throws OutputError.
    void begin(SourceFacts facts, std::vector<std::string> filter, bool connections, const WallClock& clock);
    /// Notes the name that this process has now.
    void note_process(std::uint32_t pid, const ProcessNames& live);
    /// Notes where this process belongs now.
    void note_placement(std::uint32_t pid, const ProcessNames& live);
    void add(const event& e);
    /// The source has been looked at. What was added goes to the file, unless that does not take it.
    void add(const RecordedTick& tick);
    void add(const WallClock& clock, const SourceCounts& counts);
    /// The file may have taken what was written.
    void flush();
    /// From now on the file is written behind: Stream::write_behind(). Throws OutputError.
    void write_behind() { stream_.write_behind(); }
    void end(const SourceCounts& counts);

    /// Those that the recording knows.
    [[nodiscard]] const ProcessNames& names() const { return names_; }
    [[nodiscard]] std::uint64_t events() const { return events_; }
    /// Of what was to be recorded, so many lines are missing.
    [[nodiscard]] std::uint64_t dropped() const { return refused_ + stream_.dropped(); }
    [[nodiscard]] const std::string& path() const { return options_.path; }
    /// Counted in lines.
    [[nodiscard]] OutputState state() const;
    /// What will be opened anew.
    [[nodiscard]] std::vector<std::string> files() const;
    [[nodiscard]] int descriptor() const { return stream_.descriptor(); }
    [[nodiscard]] pollfd awaited() const { return stream_.awaited(); }
    [[nodiscard]] bool closed_by_reader() const { return stream_.closed_by_reader(); }
    void reader_left() { stream_.reader_left(); }

private:
    void put(const RecordingEntry& entry);
    void write(const RecordingEntry& entry);
    void begin_part();
    [[nodiscard]] bool writes_to_file() const;
    void open_anew();
    void go_on_in_new_file();
    void rotate_if_due();
    /// FILE becomes FILE.1 and so on, and an empty FILE is there. Throws OutputError, and then FILE is as it was.
    void shift_files() const;
    void reopen_if_moved();
    void say_problem();

    RecordOptions options_;
    bool unreadable_before_ = false; ///< what is in the file: this needs a file of its own
    Stream stream_;
    NotedProcessNames names_;
    std::unordered_set<std::uint32_t> named_in_part_;
    std::unordered_set<std::uint32_t> placed_in_part_;
    RecordingHeader header_;
    RecordedClock clock_{};
    std::optional<SourceCounts> counts_;
    std::optional<RecordedTick> tick_left_out_; ///< the last one, when nothing happens
    std::uint64_t newest_event_ns_ = 0;
    std::uint64_t events_ = 0;
    std::uint64_t dropped_noted_ = 0;
    std::uint64_t refused_ = 0; ///< lines for which there was no room
    bool overflows_ = false;
    std::uint64_t rotate_after_ns_ = 0;
    bool part_ended_ = false;
    bool rotation_refused_ = false;
    int problem_said_ = 0; ///< errno
};

} // namespace finrace
