// SPDX-License-Identifier: GPL-2.0-only OR MIT
// libFuzzer: a capture that anybody may have sent, through all that `finrace run --replay` does with it: libpcap,
// decoding, following, judging, records. What is mutated is mostly one packet of a conversation, or when and in which
// order they come: else no mutation would come further than libpcap. It needs no corpus: it begins with captures of its
// own.
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "source/input.h"
#include "tests/fuzz/replay_input.h"
#include "tests/unit/capture_file.h"

extern "C" {
int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);
std::size_t LLVMFuzzerCustomMutator(std::uint8_t* data, std::size_t size, std::size_t max_size, unsigned seed);
std::size_t LLVMFuzzerMutate(std::uint8_t* data, std::size_t size, std::size_t max_size);
}

namespace {

constexpr std::size_t file_header = 24;
constexpr std::size_t packet_header = 16;

/// Conversations that race, are reset, are cut or go well, some of them from their middle.
std::string capture(std::minstd_rand& random)
{
    const auto below = [&random](unsigned limit) { return static_cast<unsigned>(random()) % limit; };
    finrace::test::CaptureFile file;
    const unsigned talks = 1 + below(3);
    for (unsigned number = 0; number < talks; ++number) {
        finrace::test::Talk talk(file, static_cast<std::uint16_t>(40000 + below(2)),
                                 static_cast<std::uint32_t>(random()) * 2);
        talk.times = 1 + static_cast<int>(below(2));
        talk.client_seen = below(8) != 0;
        talk.server_seen = below(8) != 0;
        if (below(4) != 0)
            talk.open(below(2) != 0 ? 20 : 0.01, below(2) != 0 ? 20 : 0.01);
        for (unsigned step = 0; step < 12; ++step) {
            talk.wait_ms(below(3) != 0 ? 0.1 : 1200);
            switch (below(13)) {
            case 0:
                talk.request();
                break;
            case 1:
                talk.repeat_request();
                break;
            case 2:
                talk.response();
                break;
            case 3:
                talk.client_hears();
                break;
            case 4:
                talk.server_hears();
                break;
            case 5:
                talk.client_acks();
                break;
            case 6:
                talk.server_fin();
                break;
            case 7:
                talk.client_fin();
                break;
            case 8:
                talk.server_reset();
                break;
            case 9:
                talk.server_bare_reset();
                break;
            case 10:
                talk.client_reset();
                break;
            case 11:
                talk.unseen_response(1);
                break;
            default:
                talk.exchange();
            }
        }
    }
    return file.bytes();
}

std::uint32_t word_at(const std::string& bytes, std::size_t at)
{
    std::uint32_t word = 0;
    std::memcpy(&word, bytes.data() + at, sizeof(word));
    return word;
}

/// The packets of a file with their headers; nothing of one that is damaged.
std::vector<std::string> packets_of(const std::string& file)
{
    std::vector<std::string> packets;
    for (std::size_t at = file_header; at + packet_header <= file.size();) {
        const std::size_t size = packet_header + word_at(file, at + 8);
        if (size > file.size() - at)
            return {};
        packets.push_back(file.substr(at, size));
        at += size;
    }
    return packets;
}

} // namespace

int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size)
{
    if (finrace::test::CaptureFile().bytes().compare(0, 4, reinterpret_cast<const char*>(data),
                                                     std::min<std::size_t>(size, 4)) != 0)
        return 0; // fuzz_recording's
    if (static bool first = true; std::exchange(first, false)) {
        std::minstd_rand random(1);
        finrace::test::must_replay(capture(random));
    }
    try {
        finrace::test::replay_input(data, size);
    } catch (const finrace::InputError&) { // it says so, and ends with 2
    } catch (const finrace::UsageError&) {
    }
    return 0;
}

std::size_t LLVMFuzzerCustomMutator(std::uint8_t* data, std::size_t size, std::size_t max_size, unsigned seed)
{
    std::minstd_rand random(seed);
    const auto below = [&random](std::size_t limit) { return static_cast<std::size_t>(random()) % limit; };
    const auto give = [&](const std::string& file) { return finrace::test::give(file, data, max_size); };
    const std::string file(reinterpret_cast<const char*>(data), size);
    std::vector<std::string> packets = packets_of(file);
    if (packets.size() < 2)
        return give(capture(random));
    if (below(8) == 0)
        return LLVMFuzzerMutate(data, size, max_size);
    const std::size_t at = below(packets.size());
    const std::size_t other = below(packets.size());
    switch (below(8)) {
    case 0:
        packets.erase(packets.begin() + static_cast<std::ptrdiff_t>(at));
        break;
    case 1: {
        const std::string copy = packets[at];
        packets.insert(packets.begin() + static_cast<std::ptrdiff_t>(other), copy);
        break;
    }
    case 2:
        std::swap(packets[at], packets[other]);
        break;
    case 3: // when
        LLVMFuzzerMutate(reinterpret_cast<std::uint8_t*>(packets[at].data()), 8, 8);
        break;
    default:
        if (packets[at].size() > packet_header)
            LLVMFuzzerMutate(reinterpret_cast<std::uint8_t*>(packets[at].data()) + packet_header,
                             packets[at].size() - packet_header, packets[at].size() - packet_header);
    }
    std::string mutated = file.substr(0, file_header);
    for (const std::string& packet : packets)
        mutated += packet;
    return give(mutated);
}
