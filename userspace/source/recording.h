// SPDX-License-Identifier: GPL-2.0-only OR MIT
// Recordings: all that a run took in, in its order, so that it can be judged again, to the same verdicts. A file is a
// row of lines, so that it can be cut, appended to and rotated like any log, and what is damaged costs one line:
//
//   finrace-recording 1 CRC-32 {"host":…}   a run begins, or goes on in this file (JSON: see encode_header())
//   <frame>                                 kind, payload and CRC-32, without the byte '\n' by COBS
//
// Without its header nothing of a file can be read, so a recorder writes it twice.
// COBS: Cheshire and Baker, "Consistent Overhead Byte Stuffing", IEEE/ACM Transactions on Networking 7(2), 1999; here
// with '\n' in the place of 0. The payload of an event is struct event as it stands in memory: the header says which
// version of it, and in which byte order.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "bpf/event.h"
#include "source/descriptor.h"
#include "source/input.h"
#include "source/placement.h"
#include "source/status.h"

namespace finrace {

constexpr int recording_format = 1;

/// What can't be read at all: no recording, another version of it, or no file. Its text says what and why.
struct RecordingError : std::runtime_error {
    using std::runtime_error::runtime_error;
};
/// It is something else.
struct NoRecording : RecordingError {
    using RecordingError::RecordingError;
};
/// A recording, whole perhaps, of a format or an event layout that this finrace does not read.
struct OtherVersion : RecordingError {
    using RecordingError::RecordingError;
};

/// The first line of a file, and of each run that was appended to it.
struct RecordingHeader {
    std::string version;         ///< finrace's
    std::string run;             ///< the same in all files of one run
    std::uint32_t part = 0;      ///< from 1: files of one run, in their order
    std::int64_t written_ns = 0; ///< CLOCK_REALTIME
    SourceFacts facts;
    std::vector<std::string> filter; ///< the flags by which it leaves something out, as they were typed
    bool connections = false;        ///< it has what `run --connections` needs
};

/// The source was looked at until then, and what had been taken in was judged: CLOCK_MONOTONIC in nanoseconds.
struct RecordedTick {
    std::uint64_t now_ns;
};
/// CLOCK_REALTIME less CLOCK_MONOTONIC, from here on.
struct RecordedClock {
    std::int64_t offset_ns;
};
/// The name of a process that owns connections, from here on.
struct RecordedProcess {
    std::uint32_t pid;
    std::array<char, FINRACE_COMM_LEN> name; ///< zeros at its end, if it is shorter
};
/// Where that process belongs, from here on; empty texts if that is not known.
struct RecordedPlacement {
    std::uint32_t pid;
    std::string cgroup;
    std::string pod_namespace;
    std::string pod_name;
};
Placement placement_of(const RecordedPlacement& recorded);
/// So many lines are missing here: the file could not take them.
struct RecordedGap {
    std::uint64_t lines;
};
/// The run, or this part of it, ended here as it should.
struct RecordedEnd {
    bool run; ///< else it goes on in another part
};

using RecordingEntry = std::variant<RecordingHeader, event, RecordedTick, RecordedClock, RecordedProcess,
                                    RecordedPlacement, SourceCounts, RecordedGap, RecordedEnd>;

/// One line, without its newline.
std::string encode(const RecordingEntry& entry);

/// Reads what encode() wrote, line by line, from a file or a pipe of any size.
class RecordingReader {
public:
    /// "-" is standard input. Throws RecordingError if it can't be opened, or holds no header that can be read.
    /// A read that a signal breaks off asks `stopped` whether that is the end.
    explicit RecordingReader(const std::string& path, std::function<bool()> stopped = {});
    /// The same of what is open already.
    explicit RecordingReader(Input input, std::function<bool()> stopped = {});

    /// The next entry that is whole; nothing at the end. What follows a header that is damaged is passed over, up to
    /// the next: whose it is can't be told. Throws RecordingError if a run of another version follows.
    std::optional<RecordingEntry> next();

    [[nodiscard]] const std::string& name() const { return name_; } ///< for people
    [[nodiscard]] const RecordingHeader& first() const { return first_; }
    [[nodiscard]] int descriptor() const { return file_.get(); }
    [[nodiscard]] std::uint64_t damaged_lines() const { return damaged_; } ///< those passed over included
    [[nodiscard]] bool cut_short() const { return cut_short_; }            ///< at its end, within a line

private:
    std::optional<std::string_view> next_line();

    std::string name_;
    std::function<bool()> stopped_;
    Descriptor file_;
    std::string buffer_;
    std::size_t position_ = 0;
    bool at_end_ = false;
    bool in_damage_ = false;      ///< within a line that is longer than any
    bool without_header_ = false; ///< since one that was damaged
    bool behind_header_ = true;   ///< the last entry was one
    std::uint64_t damaged_ = 0;
    bool cut_short_ = false;
    RecordingHeader first_;
    bool first_given_ = false;
};

/// The entry of one line; nothing if it is damaged. Throws OtherVersion on a header of another version.
std::optional<RecordingEntry> decode(std::string_view line);

} // namespace finrace
