// SPDX-License-Identifier: Apache-2.0
// A bundle of kernels: opened for a trusted digest, every kernel checked before it is used (docs/distribution.md).
#pragma once
#include <zstd.h>

#include <cstring>
#include <fstream>
#include <iterator>
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>

#include "json.hpp"
#include "sha256.hpp"

class Bundle {
 public:
  // Reads the file and its manifest, which must have this SHA-256 as it is stored. Throws std::runtime_error.
  Bundle(const std::string& path, const std::string& trusted) {
    std::ifstream file(path, std::ios::binary);
    data_.assign(std::istreambuf_iterator<char>(file), {});
    if (!file) fail(path + " cannot be read");
    // The end record leads to the directory, before which the manifest ends; the directory's last row has its size.
    const std::size_t row_bytes = 46 + std::strlen("manifest.json.zst");
    if (data_.size() < 22 + row_bytes || number(data_.size() - 22) != 0x06054b50) fail(path + " is no bundle");
    const std::size_t directory = number(data_.size() - 6), size = number(data_.size() - 22 - row_bytes + 24);
    if (directory > data_.size() || size > directory) fail(path + " is damaged");
    const std::string_view stored = std::string_view(data_).substr(directory - size, size);
    if (sha256(stored) != trusted) fail("the manifest's SHA-256 is " + sha256(stored) + ", trusted: " + trusted);
    manifest = JsonReader::read(decompress(stored, ZSTD_getFrameContentSize(stored.data(), stored.size()), {}));
    if (manifest["schema"].integer() != 6) fail("this program reads manifests of schema 6");
  }

  // The cubin of a kernel of the manifest.
  std::string cubin(const Json& kernel) const {
    for (const Json& shared : manifest["dictionaries"].items)
      if (shared["family"].text == kernel["tile"]["family"].text)
        return content(kernel["frame"], kernel["cubin"]["size"].integer(), kernel["cubin"]["sha256"].text,
                       content(shared, shared["raw_size"].integer(), shared["raw_sha256"].text, {}));
    fail("a kernel of a family without a dictionary");
  }

  Json manifest;

 private:
  [[noreturn]] static void fail(const std::string& what) { throw std::runtime_error(what); }

  std::uint32_t number(std::size_t at) const {
    std::uint32_t value = 0;
    for (int i = 3; i >= 0; --i) value = value << 8 | static_cast<std::uint8_t>(data_[at + i]);
    return value;
  }

  // What a frame holds, which must be so many bytes. An unknown size is beyond the limit of 16 MiB.
  static std::string decompress(std::string_view frame, unsigned long long size, const std::string& before) {
    if (size > 16 << 20) fail("a frame that is too large");
    if (ZSTD_getFrameContentSize(frame.data(), frame.size()) != size) fail("a frame of another size than announced");
    std::string found(static_cast<std::size_t>(size), '\0');
    const std::unique_ptr<ZSTD_DCtx, decltype(&ZSTD_freeDCtx)> context(ZSTD_createDCtx(), ZSTD_freeDCtx);
    ZSTD_DCtx_refPrefix(context.get(), before.data(), before.size());  // raw content, not a trained dictionary
    const std::size_t got = ZSTD_decompressDCtx(context.get(), found.data(), found.size(), frame.data(), frame.size());
    if (ZSTD_isError(got) || got != found.size()) fail("a frame that is not zstd");
    return found;
  }

  // What a frame of the manifest holds: its digest is compared before it is decompressed.
  std::string content(const Json& where, std::int64_t size, const std::string& digest,
                      const std::string& before) const {
    const auto offset = static_cast<std::uint64_t>(where["offset"].integer());
    const auto length = static_cast<std::uint64_t>(where["length"].integer());
    if (offset > data_.size() || length > data_.size() - offset || size < 0) fail("a bad frame");
    const std::string_view frame = std::string_view(data_).substr(offset, length);
    if (sha256(frame) != where["sha256"].text) fail("a frame is corrupt");
    const std::string found = decompress(frame, static_cast<unsigned long long>(size), before);
    if (sha256(found) != digest) fail("what a frame holds is corrupt");
    return found;
  }

  std::string data_;
};
